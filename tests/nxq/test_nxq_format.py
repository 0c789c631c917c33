"""docs/FORMAT.md is true: its example is the golden file, its reader reads them all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nexusquant.nxq import v1
from tests.nxq.cases import Content
from tests.nxq.golden import FOLDER, VERSIONS

TEXT = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text(encoding="utf-8")


def test_the_example_is_the_golden_file() -> None:
    (dump,) = re.findall(r"```\n(0000 .*?)```", TEXT, re.DOTALL)
    data = bytes.fromhex("".join(line[6:53] for line in dump.splitlines()))
    assert data == (FOLDER / "v1-tiny.nxq").read_bytes()


@pytest.mark.parametrize(("name", "content"), VERSIONS[1].items(), ids=VERSIONS[1].keys())
def test_its_reader_reads_the_golden_files(name: str, content: Content) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["read_nxq"]((FOLDER / f"{name}.nxq").read_bytes()) == content[:2]


def test_its_limits_are_those_of_the_package() -> None:
    for limit in (v1.MAX_HEADER, v1.MAX_CHUNKS):
        assert f"at most {limit:,}".replace(",", " ") in TEXT
