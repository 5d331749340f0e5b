"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): every layer chooses pages by bounds of their scores.

For each page of the cache the smallest and largest value of every channel of K are kept. They bound the scores that a
query can have in the page, and each layer attends to the pages with the largest bounds. With grouped-query attention
a KV head's pages are chosen once for all query heads that share it, by the largest of their bounds, so that its K and
V are read once.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.methods.pages import page_bounds, page_scores
from tidaldecode.methods.tidal import share_read
from tidaldecode.ops import KV, Choice
from tidaldecode.plan import ModelShape


class QuestAttention:
    """Attention over the pages with the largest bounds.

    Args:
        shape: heads and layers of the model.
        token_budget: tokens that a layer reads, in whole pages.
        full_layers: layers that read everything; the first two, as in the paper.
        page_size: tokens of a page, a power of two.
    """

    def __init__(
        self, shape: ModelShape, token_budget: int, full_layers: Collection[int] = (0, 1), page_size: int = 16
    ) -> None:
        self.shape = shape
        self.page_size = page_size
        self.page_budget = max(2, token_budget // page_size)
        self.full_layers = frozenset(full_layers)
        self._bounds: dict[int, Tensor] = {}
        self._scores: Tensor | None = None

    def prepare(self, layer: int, kv: KV) -> None:
        """Keeps the bounds of the pages of the cache."""
        if layer in self.full_layers:
            return
        with torch.inference_mode(False):
            bounds, kept = page_bounds(kv.k, self.page_size), self._bounds.get(layer)
        if kept is not None and (kept.shape, kept.dtype, kept.device) == (bounds.shape, bounds.dtype, bounds.device):
            kept.copy_(bounds)  # a captured step reads them where they are
        else:
            self._bounds[layer] = bounds

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Counts the pages of a step."""
        pages = -(-capacity // self.page_size)
        if self._scores is None or self._scores.shape[::2] != (len(lengths), pages):
            self._allocate(lengths, pages)
        torch.div(lengths + (self.page_size - 1), self.page_size, rounding_mode="floor", out=self._pages)
        # all pages that are read are full, but the last of the context, which is the last of every set
        chosen = torch.minimum(self._pages, self._choice.budgets)
        torch.sub(chosen * self.page_size, self._pages * self.page_size - lengths, out=self._counts)

    def _allocate(self, lengths: Tensor, pages: int) -> None:
        heads = self.shape.num_kv_heads
        with torch.inference_mode(False):
            self._scores = torch.zeros(len(lengths), heads, pages, device=lengths.device)
            self._indices = lengths.new_zeros(len(lengths), heads, min(self.page_budget, pages))
            self._pages, self._counts = torch.zeros_like(lengths), torch.zeros_like(lengths)
            self._choice = Choice.alike(lengths, self.page_budget)  # in pages, that of the new token among them

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """Attention of the new tokens in one layer; arguments and result as in `DecodeAttention.attend`."""
        if layer in self.full_layers:
            return ops.full_attention(query, kv, scale)
        assert self._scores is not None
        page_scores(query, kv, self._bounds[layer], self._scores, self.page_size)
        ops.select_tokens(self._scores, self._pages, self._choice, self._indices)
        return ops.sparse_attention(query, kv, self._indices, self._counts, None, scale, self.page_size)

    def is_full(self, layer: int) -> bool:
        """Whether a layer is one of those that read everything."""
        return layer in self.full_layers

    def tokens_read(self, context: int) -> dict[int, float]:
        """Tokens whose K and V each layer reads in one step, per KV head, at a context of `context` tokens.

        The bounds of a page are as long as the K and V of one token.
        """
        pages = -(-context // self.page_size)
        sparse = min(self.page_budget * self.page_size, context) + pages
        return {layer: context if layer in self.full_layers else sparse for layer in range(self.shape.num_layers)}

    def kv_read_fraction(self, context: int) -> float:
        """Share of the KV cache that one step reads at a context of `context` tokens, bounds counted."""
        return share_read(self.tokens_read(context), context)
