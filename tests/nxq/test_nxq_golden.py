"""Files of every version of the format are read, those of the present one written as they are."""

from __future__ import annotations

import pytest

from nexusquant import nxq
from nexusquant.nxq.reader import LAYOUTS
from tests.nxq.cases import Content, contents
from tests.nxq.golden import FOLDER, VERSIONS

FILES = {name: content for cases in VERSIONS.values() for name, content in cases.items()}


def test_every_version_that_can_be_read_has_files() -> None:
    assert set(VERSIONS) == set(LAYOUTS)
    assert {path.stem for path in FOLDER.glob("*.nxq")} == set(FILES)


@pytest.mark.parametrize(("name", "content"), FILES.items(), ids=FILES.keys())
def test_reading(name: str, content: Content) -> None:
    with nxq.Reader.open(FOLDER / f"{name}.nxq") as reader:
        reader.verify()
        assert contents(reader) == content


PRESENT = VERSIONS[nxq.VERSION]


@pytest.mark.parametrize(("name", "content"), PRESENT.items(), ids=PRESENT.keys())
def test_writing(name: str, content: Content) -> None:
    assert nxq.pack(*content) == (FOLDER / f"{name}.nxq").read_bytes(), (
        "the bytes of the format changed: that takes a new version, see docs/FORMAT.md"
    )
