"""What a cache holds when decode steps are timed: random K and V, or those of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.hf import TidalCache
from tidaldecode.hf.layers import TidalLayer


class Filling(Protocol):
    """Fills a cache, again and again."""

    def fill(self, cache: TidalCache, context: int) -> Tensor:
        """Lets the cache hold `context` tokens of each sequence.

        Returns:
            [B, 1], int64; the tokens to be decoded next.
        """
        ...


@dataclass(frozen=True)
class RandomKV:
    """Independent standard normal numbers, the same each time."""

    model: PreTrainedModel
    batch: int
    seed: int

    def fill(self, cache: TidalCache, context: int) -> Tensor:
        """See `Filling`."""
        device = self.model.device
        generator = torch.Generator(device).manual_seed(self.seed)
        cache.fill(self.batch, context, device, self.model.dtype, generator)
        size = self.batch, 1
        return torch.randint(self.model.config.vocab_size, size, generator=generator, device=device)


@dataclass
class TextKV:
    """K and V of a text's windows, read once, with full attention.

    Each window is read by itself, in a cache of one sequence, so that activations do not grow with the batch, and then
    copied to its sequences. Contexts are beginnings of the windows; the rows that steps wrote over are put back before
    the next ones.

    Args:
        model: with a plan applied.
        windows: [W, T + 1], int64; the longest context and a token behind it.
        batch: sequences; sequence `b` has window `b % W`.
        steps: most tokens that are decoded behind a context.
        on_progress: told, in words, what is being done.
    """

    model: PreTrainedModel
    windows: Tensor
    batch: int
    steps: int
    on_progress: Callable[[str], None] = lambda what: None
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def fill(self, cache: TidalCache, context: int) -> Tensor:
        """See `Filling`."""
        if not self._kept:
            self._read(cache)
        for rows, kept in self._kept:
            rows.copy_(kept)
        layers = [layer for layer in cache.layers if isinstance(layer, TidalLayer)]
        written = slice(context, context + self.steps)
        rows_of_all = [rows[:, :, written] for layer in layers for rows in (layer.keys, layer.values)]
        self._kept = [(rows, rows.clone()) for rows in rows_of_all]
        cache.rewind(context, torch.full_like(cache.sequences.lengths, context))
        for layer in layers:
            layer.code_all()
        next_ones = self.windows[:, context : context + 1].to(self.model.device)
        return next_ones[torch.arange(self.batch, device=next_ones.device) % len(next_ones)]

    def _read(self, cache: TidalCache) -> None:
        count, tokens = len(self.windows), self.windows.shape[1] - 1
        device, dtype = self.model.device, self.model.dtype
        cache.fill(self.batch, tokens, device, dtype, torch.Generator(device).manual_seed(0))
        one = TidalCache(self.model.config, "full", tokens)
        for number, window in enumerate(self.windows[:, :-1].to(device)):
            self.on_progress(f"reading {tokens:,} tokens of the text, window {number + 1} of {count}")
            one.reset()
            self.model(window[None], past_key_values=one, logits_to_keep=1)
            for mine, theirs in zip(cache.layers, one.layers, strict=True):
                mine.keys[number::count, :, :tokens] = theirs.keys[:, :, :tokens]
                mine.values[number::count, :, :tokens] = theirs.values[:, :, :tokens]
