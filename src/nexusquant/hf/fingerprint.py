"""Which model is this? Config and weights in a few hex digits, without reading every byte."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

_logger = logging.getLogger(__name__)

_SAMPLES = 16  # elements read per parameter
# Fields that every config has or that belong to `generate`, and those that only training, loading
# or the tokenizer reads. All others count: nobody knows every field that attention depends on.
_GENERIC = {*PreTrainedConfig().to_dict(), *GenerationConfig().to_dict()} - {"model_type"}
_UNRELATED = re.compile(
    "^_|_token_(id|index)$|dtype|drop|initializer|loss|label|router_logits|pretraining_tp"
    "|torchscript|quantization_config"
)

_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = (
    weakref.WeakKeyDictionary()
)


def _relevant(field: Any) -> Any:
    """A config field without what attention does not depend on, at any depth.

    What is None or False goes too: a newer transformers adds fields that are off.
    """
    if not isinstance(field, dict):
        return field
    return {
        str(name): _relevant(value)
        for name, value in field.items()
        if value is not None
        and value is not False
        and name not in _GENERIC
        and not _UNRELATED.search(str(name))
    }


def _held(model: Any, name: str, parameter: Tensor) -> Tensor | None:
    """The parameter; of one that accelerate has offloaded, what it keeps of it, if it does."""
    if not parameter.is_meta:
        return parameter
    owner, _, local = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    held = getattr(hook, "weights_map", None)
    try:
        return None if held is None else held[local]
    except KeyError:
        return None


def forget(model: Any) -> None:
    """Read the weights again: assigning to `parameter.data` leaves no trace."""
    _known.pop(model, None)


def _config(model: Any) -> str:
    return json.dumps(_relevant(model.config.to_dict()), sort_keys=True, default=str)


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """16 hex digits of a model's weights and of the config fields that attention may depend on.

    Every parameter contributes its name, shape and a few elements rounded to bf16: the same weights
    loaded in bf16 and in fp32 are the same model (so are bf16 weights loaded in fp16, fp32 weights
    need not be), and fine-tuned weights are another.
    """
    parameters = dict(model.named_parameters())
    config = _config(model)
    version = config, *((p.data_ptr(), p._version) for p in parameters.values())
    if model in _known and _known[model][0] == version:
        return _known[model][1]
    found = _digest(config, {name: _held(model, name, p) for name, p in parameters.items()})
    _known[model] = version, found
    return found


def _digest(config: str, parameters: dict[str, Tensor | None]) -> str:
    """Of a config as JSON and of weights, as far as they can be had."""
    digest = hashlib.sha256(config.encode())
    for name, weight in sorted(parameters.items()):
        if weight is None:  # nobody can say which model this is: it is like no other
            digest.update(uuid.uuid4().bytes)
            break
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if not weight.numel():
            continue
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step][:_SAMPLES]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def fingerprint_of_folder(folder: Path) -> str | None:
    """The `fingerprint` of the model in a folder, of whose weights only the samples are read.

    None if transformers does not know the model, or calls its weights otherwise than the files do.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        weights: dict[str, Tensor] = {}
        wanted = dict(model.named_parameters())
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as opened:  # mapped, not read
                weights |= {name: opened.get_tensor(name) for name in wanted.keys() & opened.keys()}
    # What transformers raises for models that it does not know is no closed list. Who asks has
    # other ways to find a profile, so it is told and not raised.
    except Exception as error:
        _logger.warning("%s: which weights it has cannot be told from its files: %s", folder, error)
        return None
    if any(name not in weights or weights[name].shape != p.shape for name, p in wanted.items()):
        return None
    return _digest(_config(model), {**weights})
