"""Stretches of a text: a prompt that is read once, and decode steps that run behind it under any attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.calibrate.settings import Probes
from tidaldecode.errors import InputError
from tidaldecode.evaluate.prompt import read_prompt
from tidaldecode.evaluate.scoring import not_finite, step_logits
from tidaldecode.hf import TidalCache
from tidaldecode.hf.cache import Mark
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models import model_shape
from tidaldecode.plans.find import find_plan

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Stretch:
    """A prompt in a cache, and the tokens behind it.

    Attributes:
        model: that read the prompt.
        cache: holds the prompt.
        mark: the end of the prompt in the cache.
        tokens: [1, n + 1]; the tokens of the n decode steps, and the last one, which is only predicted.
        text_steps: how many of the n steps predict the text's own tokens; the rest are probes.
    """

    model: PreTrainedModel
    cache: TidalCache
    mark: Mark
    tokens: Tensor
    text_steps: int

    @classmethod
    def read(cls, model: PreTrainedModel, window: Tensor, text_steps: int, probe_steps: int = 0) -> Stretch:
        """Reads the prompt of a window, [1, T]; the steps behind it predict the last tokens of the window.

        Args:
            model: with a plan applied.
        """
        cache = TidalCache(model.config, find_plan("full", model.config), window.shape[1])
        tokens = read_prompt(model, cache, window, text_steps + probe_steps)
        return cls(model, cache, cache.mark(), tokens, text_steps)

    @property
    def steps(self) -> int:
        """Decode steps, n."""
        return self.tokens.shape[1] - 1

    def run(self, attention: Attention, keep: Callable[[Tensor], Kept], at_once: int | None = None) -> list[Kept]:
        """Runs the steps under an attention; the cache stands at the end of the prompt again afterwards.

        Args:
            attention: of a method, for one sequence.
            keep: makes of the logits of some of the steps, [1, m, V], what is returned for them.
            at_once: the most steps of one pass, where memory doesn't allow fewer.
        """
        self.cache.attention = attention
        parts = torch.split(self.tokens[:, :-1], at_once or self.steps, 1)
        with torch.inference_mode():
            kept = [keep(logits) for part in parts for logits in step_logits(self.model, self.cache, part)]
        self.cache.go_back(self.mark)
        return kept

    def log_probs(self, attention: Attention) -> list[Tensor]:
        """Next-token distributions under an attention, in parts [m, V], float32."""
        return self.run(attention, lambda logits: logits[0].float().log_softmax(1))

    @cached_property
    def full_log_probs(self) -> Tensor:
        """Full attention's next-token distributions, [n, V], float32."""
        config = self.model.config
        return torch.cat(self.log_probs(DecodeAttention(find_plan("full", config), model_shape(config))))

    def check(self) -> None:
        """Refuses a model whose likelihoods, by full attention, are not finite.

        Raises:
            InputError: they are not.
        """
        if not self.full_log_probs.isfinite().all():
            raise InputError(not_finite(self.model.dtype))


def with_probes(window: Tensor, decode: int, probes: Probes, generator: torch.Generator) -> Tensor:
    """A window, [1, T], and behind it stretches of its prompt, one from each of as many equal parts, in random order.

    Args:
        decode: last tokens of the window that are decoded; the token before them is, too.
        probes: how many, and how long.
        generator: of their places and order.
    """
    prompt = window[:, : -decode - 1]
    part = (prompt.shape[1] - probes.tokens) // max(1, probes.count)
    starts = [
        number * part + int(torch.randint(max(1, part), (), generator=generator)) for number in range(probes.count)
    ]
    order = torch.randperm(probes.count, generator=generator).tolist()
    return torch.cat([window, *(prompt[:, starts[number] : starts[number] + probes.tokens] for number in order)], 1)
