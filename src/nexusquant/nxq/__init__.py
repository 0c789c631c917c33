"""The .nxq container: checksummed chunks that are read one at a time (docs/FORMAT.md)."""

from nexusquant.nxq.atomic import atomic_file
from nexusquant.nxq.head import VERSION
from nexusquant.nxq.reader import Reader
from nexusquant.nxq.sources import Source
from nexusquant.nxq.writer import Writer, pack, write_file

__all__ = ["VERSION", "Reader", "Source", "Writer", "atomic_file", "pack", "write_file"]
