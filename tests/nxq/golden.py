"""The files of tests/golden/nxq: what they hold, and `python -m tests.nxq.golden` to add one.

Bytes of a version never change: a difference is a new version of the format, with new files beside
these.
"""

from __future__ import annotations

from pathlib import Path

from nexusquant import nxq
from tests.nxq.cases import SMALL, Content

FOLDER = Path(__file__).parents[1] / "golden" / "nxq"
VERSIONS: dict[int, dict[str, Content]] = {
    1: {
        "v1-empty": ({}, {}, {}),
        "v1-tiny": ({"codec": "none"}, {"a": [b"hello", b"!"]}, {}),
        "v1-small": SMALL,
        "v1-many": ({}, {f"layer.{i}": [bytes([i, j]) for j in range(9)] for i in range(9)}, {}),
    }
}


def add_missing() -> None:
    """Write the files of the present version that are not there yet."""
    for name, content in VERSIONS[nxq.VERSION].items():
        path = FOLDER / f"{name}.nxq"
        if not path.exists():
            nxq.write_file(path, *content)


if __name__ == "__main__":
    add_missing()
