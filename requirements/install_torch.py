"""Install the pinned torch into this Python, without CUDA's gigabytes where there is no GPU.

    python requirements/install_torch.py requirements/dev.txt [--any] [pip options ...]

PyPI's torch for Linux brings CUDA along. Without an NVIDIA GPU a CPU build is looked for: on the
package index that pip is set up with, then on PyTorch's own. `--any` takes what the index has.
Only the standard library is used: nothing else is installed yet.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = [sys.executable, "-m", "pip"]


def main(arguments: list[str]) -> int:
    if not arguments:
        raise SystemExit(__doc__)
    pins, *options = arguments
    whatever = "--any" in options
    options = [option for option in options if option != "--any"]
    version = pinned(Path(pins))
    if installed().partition("+")[0] == version:
        return 0
    if whatever or has_gpu() or not brings_cuda():
        return install(f"torch=={version}", *options)
    if f"{version}+cpu" in offered(options):
        return install(f"torch=={version}+cpu", *options)
    here = ["--no-deps", "--index-url", CPU_INDEX, "--retries", "1", "--timeout", "20"]
    if not install(f"torch=={version}", *here):
        return 0
    sys.stderr.write(
        f"There is no NVIDIA GPU here and no CPU build of torch {version} in reach: not on pip's"
        f" index, and {CPU_INDEX} did not give one.\n`make TORCH=any ...` installs what pip's index"
        " has, with CUDA (several GB).\n"
    )
    return 1


def pinned(pins: Path) -> str:
    found = re.search(r"^torch==([\w.]+)", pins.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{pins}: pins no torch.")
    return found[1]


def installed() -> str:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU whose driver answers."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and not subprocess.run([tool, "-L"], capture_output=True).returncode


def brings_cuda() -> bool:
    """Whether PyPI's torch for this platform is a CUDA build."""
    return platform.system() == "Linux"


def offered(options: list[str]) -> list[str]:
    """Versions of torch on the index that pip is set up with."""
    command = [*PIP, "index", "versions", "torch", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return re.findall(r"[\w.+]+", done.stdout)


def install(*arguments: str) -> int:
    return subprocess.run([*PIP, "install", "--quiet", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
