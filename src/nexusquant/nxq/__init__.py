"""The .nxq container: checksummed sections that are read one at a time (docs/FORMAT.md)."""
