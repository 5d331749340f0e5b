"""A baseline as `docs/adding-a-method.md` shows it: the last tokens alone, in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode import ModelShape, ops
from tidaldecode.methods.method import Method
from tidaldecode.methods.protocol import Attention
from tidaldecode.ops import KV


@dataclass(frozen=True)
class LastTokens(Method):
    """Its settings: the budget alone."""

    name = "last-tokens"

    def reading(self, shape: ModelShape, tokens: int) -> Attention:
        """See `Method`."""
        return LastTokensAttention(shape, tokens)


class LastTokensAttention(Attention):
    """Attention over the last tokens."""

    def __init__(self, shape: ModelShape, token_budget: int) -> None:
        self.shape, self.token_budget = shape, token_budget
        self._indices: Tensor | None = None

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Writes the step's one index set, in place: a captured step reads it there."""
        if self._indices is None or self._indices.shape[::2] != (len(lengths), min(self.token_budget, capacity)):
            with torch.inference_mode(False):
                self._indices = lengths.new_zeros(len(lengths), 1, min(self.token_budget, capacity))
                self._entries = torch.arange(self._indices.shape[2], dtype=torch.int32, device=lengths.device)
                self._counts = torch.zeros_like(lengths)
        torch.clamp(lengths, max=self.token_budget, out=self._counts)
        self._indices[:, 0] = self._entries + (lengths - self._counts)[:, None]

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """See `Attention`."""
        assert self._indices is not None
        return ops.sparse_attention(query, kv, self._indices, self._counts, None, scale)

    def tokens_read(self, context: int) -> dict[int, float]:
        """See `Attention`."""
        return dict.fromkeys(range(self.shape.num_layers), min(self.token_budget, context))
