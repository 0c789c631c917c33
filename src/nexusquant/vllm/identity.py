"""Which weights a server runs, said so that two servers agree and two models differ."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from nexusquant.vllm.keys import canonical

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_ELSEWHERE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Entries of a config that differ where keys and values do not, or that are said otherwise."""


def identity(
    model: str, revision: str | None, config: Any, quantization: str | None
) -> dict[str, Any]:
    """What distinguishes the keys and values of a model from those of others.

    A folder is told by its weights, wherever it lies: by the name and size of each file and by a
    sample of its bytes. A hub id is told by its name and by the commit that was loaded.

    Args:
        config: the Hugging Face config, after overrides, as an object or dict.
    """
    entries = config if isinstance(config, dict) else config.to_dict()
    told: dict[str, Any] = {
        "config": hashlib.sha256(_settings(entries)).hexdigest(),
        "quantization": quantization,
    }
    path = Path(model).expanduser()
    if path.exists():
        return told | {"weights": _sampled(path)}
    commit = getattr(config, "_commit_hash", None)
    return told | {"name": model, "revision": commit or revision}


def _settings(entries: dict[str, Any]) -> bytes:
    kept = {key: value for key, value in entries.items() if key not in _ELSEWHERE}
    return canonical(_plain(kept))


def _plain(value: Any) -> Any:
    """Config entries as JSON; what is none by its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _sampled(path: Path) -> str:
    """A digest of weights: a file, or all files of weights in a folder."""
    files = [path] if path.is_file() else sorted({f for p in _WEIGHTS for f in path.glob(p)})
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(canonical([file.name, size]))
        with file.open("rb") as opened:
            for part in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLE_BYTES) * part // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
