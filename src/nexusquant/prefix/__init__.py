"""Prefixes of sequences, saved and loaded: caches to .nxq files and back."""
