"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): the first tokens and the last ones, in every layer.

Tokens keep the positions that they had, as in the comparisons of other papers; nothing is evicted from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.methods.method import Method
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.step_sets import fits
from tidaldecode.ops import KV
from tidaldecode.plan import ModelShape


@dataclass(frozen=True)
class Streaming(Method):
    """StreamingLLM with its four sinks."""

    name = "streaming"

    def reading(self, shape: ModelShape, tokens: int) -> Attention:
        """See `Method`."""
        return StreamingAttention(shape, tokens)


class StreamingAttention(Attention):
    """Attention over sinks and recent tokens.

    Args:
        shape: heads and layers of the model.
        token_budget: tokens that a layer reads, sinks included.
        sink_tokens: first tokens that are always read.
    """

    def __init__(self, shape: ModelShape, token_budget: int, sink_tokens: int = 4) -> None:
        self.shape = shape
        self.token_budget = token_budget
        self.sink_tokens = min(sink_tokens, token_budget - 1)
        self._indices: Tensor | None = None

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Writes the step's one index set."""
        width = min(self.token_budget, capacity)
        if not fits(self._indices, lengths, width):
            with torch.inference_mode(False):
                self._indices = lengths.new_zeros(len(lengths), 1, width)
                self._entries = torch.arange(width, dtype=torch.int32, device=lengths.device)
                self._counts = torch.zeros_like(lengths)
        assert self._indices is not None
        skipped = (lengths - self.token_budget).clamp(min=0)[:, None]
        self._indices[:, 0] = torch.where(self._entries < self.sink_tokens, self._entries, self._entries + skipped)
        torch.clamp(lengths, max=self.token_budget, out=self._counts)

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """See `Attention`."""
        assert self._indices is not None
        return ops.sparse_attention(query, kv, self._indices, self._counts, None, scale)

    def tokens_read(self, context: int) -> dict[int, float]:
        """See `Attention`."""
        return dict.fromkeys(range(self.shape.num_layers), min(self.token_budget, context))
