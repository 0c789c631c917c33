"""Newer versions whose smoke tests fail for reasons that are not ours.

`make smoke` fails for every other version, and prints these at each run. To record one, add a line
("transformers", "5.25.0"): ("2026-12-01", "what fails, and why that is not ours (link)"). It goes
as soon as a newer release is out: the tests run with that one then.
"""

from __future__ import annotations

KNOWN_FAILURES: dict[tuple[str, str], tuple[str, str]] = {}
"""Package and version to date and reason."""
