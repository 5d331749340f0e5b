"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): the first tokens and the last ones, in every layer.

Tokens keep the positions that they had, as in the comparisons of other papers; nothing is evicted from the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.ops import KV
from tidaldecode.plan import ModelShape


class StreamingAttention:
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

    def prepare(self, layer: int, kv: KV) -> None:
        """Nothing is kept beside the cache."""

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Writes the step's one index set."""
        width = min(self.token_budget, capacity)
        table = self._indices
        if table is None or table.shape[::2] != (len(lengths), width) or table.device != lengths.device:
            with torch.inference_mode(False):
                self._indices = lengths.new_zeros(len(lengths), 1, width)
                self._entries = torch.arange(width, dtype=torch.int32, device=lengths.device)
                self._counts = torch.zeros_like(lengths)
        assert self._indices is not None
        skipped = (lengths - self.token_budget).clamp(min=0)[:, None]
        self._indices[:, 0] = torch.where(self._entries < self.sink_tokens, self._entries, self._entries + skipped)
        torch.clamp(lengths, max=self.token_budget, out=self._counts)

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """Attention of the new tokens in one layer; arguments and result as in `DecodeAttention.attend`."""
        assert self._indices is not None
        return ops.sparse_attention(query, kv, self._indices, self._counts, None, scale)

    def is_full(self, layer: int) -> bool:
        """No layer is."""
        return False

    def tokens_read(self, context: int) -> dict[int, float]:
        """Tokens whose K and V each layer reads in one step, per KV head, at a context of `context` tokens."""
        return dict.fromkeys(range(self.shape.num_layers), min(self.token_budget, context))

    def kv_read_fraction(self, context: int) -> float:
        """Share of the KV cache that one step reads at a context of `context` tokens."""
        return min(self.token_budget, context) / context
