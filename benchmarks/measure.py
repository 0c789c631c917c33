"""What a compressed prompt does to the continuation: KL, perplexity, and the needle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.competitors import Competitor, Prefilled, Prompt, Uncompressed
from nexusquant.hf.cache_names import cache_argument

CODE = "73914"
FACT = f"\nRemember this: the secret code of the harbour is {CODE}.\n"
ASK = (
    "\nQuestion: what is the secret code of the harbour?\nAnswer: the secret code of the harbour is"
)


@dataclass(frozen=True)
class Text:
    """One text, tokenized: a prompt with a fact hidden in it, and what is scored behind it.

    Attributes:
        prompt: (1, prefix), the fact a third of the way in.
        behind: (1, continuation + question + answer): all is fed in one pass.
        scored: length of the continuation.
        answer: length of the answer.
    """

    name: str
    prompt: Tensor
    behind: Tensor
    scored: int
    answer: int


def prepare(tokenizer: Any, name: str, text: str, prefix: int, continuation: int) -> Text | None:
    """None if the text is too short."""
    fact, ask, answer = (
        tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids
        for part in (FACT, ASK, f" {CODE}")
    )
    body = prefix - fact.shape[1]
    # About five characters a token: a tokenizer must not read a whole book for its first page.
    ids = tokenizer(text[: 20 * (prefix + continuation)], return_tensors="pt", verbose=False)
    ids = ids.input_ids[:, : body + continuation]
    if body < 2 or ids.shape[1] < body + continuation:
        return None
    third = body // 3
    prompt = torch.cat([ids[:, :third], fact, ids[:, third:body]], dim=1)
    behind = torch.cat([ids[:, body:], ask, answer], dim=1)
    return Text(name, prompt, behind, continuation, answer.shape[1])


@dataclass(frozen=True)
class Score:
    """One competitor on one text.

    Attributes:
        kl: mean KL(full || compressed) of the next-token distributions, nats.
        loss_change: of the mean negative log-likelihood, nats per token.
        top1: share of positions with the same most likely token.
        needle: right answer tokens of those the uncompressed cache gets right; nan if none.
    """

    kl: float
    loss_change: float
    top1: float
    needle: float


@dataclass(frozen=True)
class Reference:
    """The uncompressed continuation of a prompt."""

    prompt: Prompt
    text: Text
    logits: Tensor

    @classmethod
    def of(cls, model: Any, text: Text) -> Reference:
        prompt = Prompt.of(model, text.prompt.to(model.device))
        return cls(prompt, text, _logits(Uncompressed().prefill(prompt), prompt, text))

    def run(self, competitor: Competitor) -> tuple[Score, Prefilled]:
        """Raises `NotRunnable`."""
        with torch.no_grad():
            prefilled = competitor.prefill(self.prompt)
            return self._score(_logits(prefilled, self.prompt, self.text)), prefilled

    def _score(self, logits: Tensor) -> Score:
        scored, answer = self.text.scored, self.text.answer
        full = torch.log_softmax(self.logits[:scored], -1)
        ours = torch.log_softmax(logits[:scored], -1)
        behind = self.text.behind[0].to(logits.device)
        target = behind[1:scored, None]
        right_full, right = (
            x[-answer - 1 : -1].argmax(-1) == behind[-answer:] for x in (self.logits, logits)
        )
        known = int(right_full.sum())
        return Score(
            kl=(full.exp() * (full - ours)).sum(-1).mean().item(),
            loss_change=(full[:-1].gather(1, target) - ours[:-1].gather(1, target)).mean().item(),
            top1=(full.argmax(-1) == ours.argmax(-1)).float().mean().item(),
            needle=int((right & right_full).sum()) / known if known else math.nan,
        )


@torch.no_grad()
def _logits(prefilled: Prefilled, prompt: Prompt, text: Text) -> Tensor:
    """(tokens behind the prompt, vocabulary), float32."""
    behind = text.behind.to(prompt.ids.device)
    extra: dict[str, Any] = {}
    if prefilled.keep is not None:
        keep = prefilled.keep.to(behind.device).long()
        extra["attention_mask"] = torch.cat([keep, torch.ones_like(behind)], dim=1)
    # Given, because a model that sees a mask would count positions from it.
    positions = torch.arange(behind.shape[1], device=behind.device)[None] + prompt.tokens
    extra |= cache_argument(prompt.model, prefilled.cache)
    output = prompt.model(behind, use_cache=True, position_ids=positions, **extra)
    return output.logits[0].float()
