"""Which transformers the tests run with: README, `nexusquant info`, `doctor` and pyproject say it
alike."""

TRANSFORMERS = ("5.1.0", "5.24.0")
"""Oldest and newest transformers tested; what is newer is used as the newest one."""
