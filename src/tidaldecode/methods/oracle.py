"""The oracle: every layer reads the tokens that its own scores of the current query choose.

The best that choosing by attention scores can do at a budget, and no way to save time: the scores of the whole context
are computed first. It shows how much of a method's loss lies in the budget, and how much in the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.methods.tidal import map_of_heads, share_read
from tidaldecode.ops import KV, Choice
from tidaldecode.plan import ModelShape, Selection


class OracleAttention:
    """Attention over each layer's own exact top-k; the new token is one of them, and there are no sinks.

    Args:
        shape: heads and layers of the model.
        token_budget: tokens that a layer reads, the new token included; at least 2.
        selection: whose scores choose, as in a plan.
        full_layers: how many of the first layers read everything.
    """

    def __init__(
        self, shape: ModelShape, token_budget: int, selection: Selection = "per_head", full_layers: int = 0
    ) -> None:
        self.shape = shape
        self.full_layers = full_layers
        self.token_budget = token_budget
        self.selection: Selection = selection
        self._indices: Tensor | None = None
        self._capacity = 0

    def prepare(self, layer: int, kv: KV) -> None:
        """Nothing is kept beside the cache."""

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Counts the tokens of a step."""
        table = self._indices
        if table is None or len(table) != len(lengths) or table.device != lengths.device or self._capacity != capacity:
            sets = self.shape.num_sets(self.selection)
            with torch.inference_mode(False):
                self._indices = lengths.new_zeros(len(lengths), sets, min(self.token_budget, capacity))
                self._counts = torch.zeros_like(lengths)
                self._map = map_of_heads(self.shape, self.selection, lengths.device)
                self._choice = Choice.alike(lengths, self.token_budget)
            self._capacity = capacity
        torch.minimum(self._choice.budgets, lengths, out=self._counts)

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """Attention of the new tokens in one layer; arguments and result as in `DecodeAttention.attend`."""
        if self.is_full(layer):
            return ops.full_attention(query, kv, scale)
        assert self._indices is not None
        ops.full_attention_with_selection(
            query, kv, scale, [self.selection], self._choice, self._capacity, self._indices
        )
        return ops.sparse_attention(query, kv, self._indices, self._counts, self._map, scale)

    def is_full(self, layer: int) -> bool:
        """Whether a layer is one of those that read everything."""
        return layer < self.full_layers

    def tokens_read(self, context: int) -> dict[int, float]:
        """Tokens whose K and V each layer reads in one step, per KV head, once they are chosen.

        Query heads of one KV head that choose for themselves read their tokens one by one, and are counted so.
        """
        sets = self.shape.sets_per_kv_head(self.selection)
        reads = self.token_budget * sets if self.token_budget < context else context
        return {layer: context if self.is_full(layer) else reads for layer in range(self.shape.num_layers)}

    def kv_read_fraction(self, context: int) -> float:
        """Share of the KV cache that one step reads at a context of `context` tokens, once the tokens are chosen."""
        return share_read(self.tokens_read(context), context)
