"""One prompt, answered with a plain and with a compressed cache, timed and measured in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from nexusquant import NexusCache
from nexusquant.accounting import CacheStats
from nexusquant.errors import ConfigError
from nexusquant.hf.cache import cache_stats
from nexusquant.hf.cache_names import generate_cache_name
from nexusquant.hf.transformers_private import BaseStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nexusquant.config import CompressionConfig

QUESTION = (
    "According to the text above, what is the name of the module that defines an interactive "
    "source code debugger?"
)
# The answer stands in "debugger", after topics that do not help and before thousands of tokens
# that do not either. These topics exist in every supported Python.
_TOPICS = ("assert", "break", "continue", "debugger", "naming", "execmodel", "import", "compound")


def demo_text() -> str:
    """Real prose that every Python carries: help topics of the language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in _TOPICS)


def calibration_text() -> str:
    """The help topics of the language reference that `demo_text` leaves out."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(set(topics) - set(_TOPICS)))


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> tuple[str, int]:
    """The first `count` tokens of `text` as text, and how many tokens `text` has in all."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) <= count:
        return text, len(ids)
    return str(tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)), len(ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool = True) -> Tensor:
    """Token ids `(1, tokens)`, through the chat template if `chat` and the tokenizer has one.

    Raises:
        ConfigError: the prompt has no tokens.
    """
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = str(
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[-1] == 0:
        raise ConfigError("the prompt is empty: give --prompt-file, --prompt or both.")
    return ids.long()


def context_limit(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for, None if its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@dataclass(frozen=True)
class Run:
    """One timed generation. Times in seconds, bytes from allocated storage."""

    answer: str
    new_tokens: int
    first_token_seconds: float
    seconds_per_token: float | None
    """Mean over the tokens after the first, None if there was only one."""
    stats: CacheStats


class _TokenTimer(BaseStreamer):
    """Notes when each new token comes out of `generate`; its first `put` is the prompt."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.prompt_seen = False
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.on_token(len(self.times))

    def end(self) -> None:
        """Nothing is buffered."""


def timed_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    config: CompressionConfig | None,
    max_new_tokens: int,
    on_token: Callable[[int], None] = lambda count: None,
    open_cache: Callable[[], Any] | None = None,
) -> Run:
    """Greedy generation from `input_ids` `(1, tokens)`.

    Args:
        config: how the cache is compressed; None for the stock `DynamicCache`.
        on_token: called with the number of new tokens as each one is ready.
        open_cache: gives a cache that holds the first of the tokens; default: a fresh one.
    """
    input_ids = input_ids.to(model.device)
    timer = _TokenTimer(on_token)
    start = time.perf_counter()
    if open_cache is not None:
        cache: Any = open_cache()
    else:
        cache = NexusCache(model, config) if config else DynamicCache(config=model.config)
    output: Any = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **{generate_cache_name(): cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=_pad_token_id(model, tokenizer),
        streamer=timer,
    )
    new, times = output[0, input_ids.shape[1] :], timer.times
    return Run(
        answer=str(tokenizer.decode(new, skip_special_tokens=True)).strip(),
        new_tokens=len(new),
        first_token_seconds=times[0] - start,
        seconds_per_token=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        stats=cache_stats(cache),
    )


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    config: CompressionConfig,
) -> None:
    """A few tokens with either cache, so that the first timed run does not pay for thread pools,
    imports and tables, and the second not less than the first."""
    for each in (config, None):
        timed_run(model, tokenizer, input_ids[:, :64], each, 3)


def comparison_table(plain: Run, compressed: Run, title: str, name: str = "compressed") -> Table:
    """Plain and compressed (or what `name` says) side by side."""
    table = Table(title=title, title_justify="left", min_width=76)
    table.add_column("KV cache")
    table.add_column("plain", justify="right")
    table.add_column(name, justify="right")

    def row(label: str, show: Callable[[Run], str]) -> None:
        table.add_row(label, show(plain), show(compressed))

    row("bytes, measured", lambda run: f"{run.stats.nbytes / 2**20:,.2f} MiB")
    row("the same tokens in fp16", lambda run: f"{run.stats.fp16_nbytes / 2**20:,.2f} MiB")
    row("ratio, fp16 bytes / measured", lambda run: f"{run.stats.compression_ratio:.2f}x")
    row("bits per element", lambda run: f"{run.stats.bits_per_element:.2f}")
    row("tokens kept per head", lambda run: f"{run.stats.kept_tokens:,.0f} of {run.stats.tokens:,}")
    row("time to first token", lambda run: f"{run.first_token_seconds:.2f} s")
    row("time per further token", lambda run: _milliseconds(run.seconds_per_token))
    row("tokens generated", lambda run: f"{run.new_tokens:,}")
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


def _pad_token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """One sequence needs no padding, but `generate` warns unless it knows a token for it."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    eos = getattr(model.generation_config, "eos_token_id", None)
    return eos[0] if isinstance(eos, list) else eos
