"""The files of tests/golden/prefix, and `python -m tests.prefix.golden` to add those of a version.

Files are never made again: who reads them otherwise than what lies beside them breaks the prefixes
of all users. A codec that changes its bytes, or what they mean, gets a new version, with new files.
Nothing here is random or comes from a library, as the tests make the same models, not the files.
"""

from __future__ import annotations

from tests.prefix.golden_entropy import entropy_files
from tests.prefix.golden_live import LIVE, live_files
from tests.prefix.golden_parts import FOLDER


def add_missing() -> None:
    """Write the files that are not there yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = entropy_files()
    for kind in LIVE:
        files |= live_files(kind)
    for name, data in files.items():
        path = FOLDER / name
        if not path.exists():
            path.write_bytes(data)


if __name__ == "__main__":
    add_missing()
