"""Run the smoke tests with another version of transformers or torch than the pinned one.

    python -m tests.versions.environments oldest | newest | torch [arguments for pytest]

`oldest` is the oldest transformers that we allow, `newest` the newest on the package index at this
moment, `torch` the newest CPU build of torch there. Each gets an environment over the one that this
runs in, which is left as it is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

from nexusquant.versions import TRANSFORMERS
from tests.versions.known_failures import KNOWN_FAILURES

ROOT = Path(__file__).parents[2]
SUITE = ("tests/versions", "tests/test_guides.py", "tests/test_readme.py",
         "tests/hf/test_transformers_private.py")  # fmt: skip


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("oldest", "newest", "torch"):
        raise SystemExit(__doc__)
    which, *options = arguments
    package = "torch" if which == "torch" else "transformers"
    here = version(package)
    wanted = TRANSFORMERS[0] if which == "oldest" else newest(package)
    if wanted is None:
        say(f"the package index has no CPU build of {package} that is newer than {here}.")
        return 0
    if which != "oldest" and numbers(wanted) < numbers(here):
        say(f"the package index has no {package} newer than {wanted}; the pinned one is {here}.")
        return 0
    if numbers(wanted) == numbers(here):
        say(f"{package} {wanted} is the {which} there is, and the pinned one: `make test` has it.")
        return 0
    say(f"{package} {wanted} ({which}); `make test` runs with {here}")
    known = KNOWN_FAILURES.get((package, wanted.partition("+")[0]))
    python = environment(which, f"{package}=={wanted}")
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *SUITE],
        cwd=ROOT, check=False,
    )  # fmt: skip
    if not done.returncode:
        stale = "; its entry in tests/versions/known_failures.py can go" if known else ""
        say(f"{package} {wanted}: passed{stale}")
        return 0
    if known is not None and done.returncode == 1:  # of pytest: tests failed, nothing worse
        say(f"{package} {wanted}: FAILS as recorded on {known[0]}: {known[1]}")
        return 0
    say(
        f"{package} {wanted}: FAILED. If the cause is not ours, record it with a date and a reason"
        " in tests/versions/known_failures.py, which says how; these tests go on then and print it."
    )
    return done.returncode


def newest(package: str) -> str | None:
    """The newest release on the index that pip is set up with; of torch, the newest CPU build."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = re.search(r"Available versions: (.*)", done.stdout)
    if found is None:
        raise SystemExit(f"== the package index did not say which versions of {package} it has.")
    versions = found[1].split(", ")  # newest first
    if package != "torch":
        return versions[0]
    return next((x for x in versions if x.endswith("+cpu")), None)


def numbers(release: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" as (2, 13, 0)."""
    return tuple(int(x) for x in release.partition("+")[0].split(".") if x.isdigit())


def environment(name: str, requirement: str) -> Path:
    """The Python of an environment over this one that has something else installed."""
    folder = Path(sys.prefix).with_name(f".venv-{name}")
    venv.create(folder, with_pip=True, clear=True)
    bin_name = "Scripts" if os.name == "nt" else "bin"
    python = folder / bin_name / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True)
    below = sysconfig.get_path("purelib")
    # `addsitedir` also reads the .pth files there: our own editable install is one.
    Path(site.stdout.strip(), "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
    return python


def say(text: str) -> None:
    sys.stdout.write(f"== {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
