"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): every layer chooses pages by bounds of their scores.

For each page of the cache the smallest and largest value of every channel of K are kept. They bound the scores that a
query can have in the page, and each layer attends to the pages with the largest bounds. With grouped-query attention
a KV head's pages are chosen once for all query heads that share it, by the largest of their bounds, so that its K and
V are read once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.errors import InputError
from tidaldecode.methods.method import Method
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.step_sets import StepSets, fits
from tidaldecode.ops import KV, Choice
from tidaldecode.plan import ModelShape


@dataclass(frozen=True)
class Quest(Method):
    """Quest.

    Attributes:
        page_size: tokens of a page, a power of two.
        full_layers: how many of the first layers read everything; two, as in the paper.
    """

    name = "quest"
    page_size: int = 16
    full_layers: int = 2

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise InputError(f"page size {self.page_size} is no power of two")
        super().__post_init__()

    @property
    def least(self) -> tuple[int, str]:
        """See `Method`: in pages."""
        return 2 * self.page_size, f"two pages of {self.page_size}"

    def settings(self) -> dict[str, str | int | None]:
        """See `Method`."""
        return {"page_size": self.page_size, "full_layers": self.full_layers}

    def reading(self, shape: ModelShape, tokens: int) -> Attention:
        """See `Method`."""
        return QuestAttention(shape, tokens, range(self.full_layers), self.page_size)


class QuestAttention(Attention):
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
        pages, heads = -(-capacity // self.page_size), self.shape.num_kv_heads
        if not fits(self._scores, lengths, pages):
            with torch.inference_mode(False):
                self._scores = torch.zeros(len(lengths), heads, pages, device=lengths.device)
                self._pages = torch.zeros_like(lengths)
                choice = Choice.alike(lengths, self.page_budget)  # in pages, that of the new token among them
                self._sets = StepSets.room(lengths, heads, min(self.page_budget, pages), choice)
        torch.div(lengths + (self.page_size - 1), self.page_size, rounding_mode="floor", out=self._pages)
        # all pages that are read are full, but the last of the context, which is the last of every set
        chosen = torch.minimum(self._pages, self._sets.choice.budgets)
        torch.sub(chosen * self.page_size, self._pages * self.page_size - lengths, out=self._sets.counts)

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """See `Attention`."""
        if layer in self.full_layers:
            return ops.full_attention(query, kv, scale)
        assert self._scores is not None
        page_scores(query, kv, self._bounds[layer], self._scores, self.page_size)
        ops.select_tokens(self._scores, self._pages, self._sets.choice, self._sets.indices)
        return ops.sparse_attention(query, kv, self._sets.indices, self._sets.counts, None, scale, self.page_size)

    def is_full(self, layer: int) -> bool:
        """Whether a layer is one of those that read everything."""
        return layer in self.full_layers

    def tokens_read(self, context: int) -> dict[int, float]:
        """See `Attention`; the bounds of a page are as long as the K and V of one token."""
        pages = -(-context // self.page_size)
        sparse = min(self.page_budget * self.page_size, context) + pages
        return {layer: context if layer in self.full_layers else sparse for layer in range(self.shape.num_layers)}


def page_bounds(k_cache: Tensor, page_size: int) -> Tensor:
    """The smallest and the largest value of every channel of K in each page of each block.

    Args:
        k_cache: [num_blocks, block_size, Hkv, D]; the contiguous cache, a block a sequence.
        page_size: tokens of a page.

    Returns:
        [num_blocks, Hkv, pages, 2, D], dtype of `k_cache`; of pages that are not full yet undefined.
    """
    num_blocks, tokens, heads, dim = k_cache.shape
    pages, full = -(-tokens // page_size), tokens // page_size
    bounds = k_cache.new_zeros(num_blocks, heads, pages, 2, dim)
    for block, rows in enumerate(k_cache):  # one block at a time: a cache can be most of a GPU
        paged = rows[: full * page_size].unflatten(0, (full, page_size))
        bounds[block, :, :full, 0] = paged.amin(1).transpose(0, 1)
        bounds[block, :, :full, 1] = paged.amax(1).transpose(0, 1)
    return bounds


def page_scores(query: Tensor, kv: KV, bounds: Tensor, scores: Tensor, page_size: int) -> None:
    """Writes an upper bound of the scores in each page, and keeps the bounds of the newest page once it is full.

    With `m` and `M` the bounds of a page, `q · k <= Σ_d max(q_d m_d, q_d M_d)` for all its tokens; of the query heads
    of a KV head the largest counts. The bounds of the newest page come from its rows, so that sequences of several
    lengths can share a block.

    Args:
        query: [B, Hq, D].
        kv: the cache; contiguous, the new token included.
        bounds: [num_blocks, Hkv, pages, 2, D], see `page_bounds`; that of the newest token's page is written if the
            token is the last of the page.
        scores: [B, Hkv, pages], float32, written up to the page of the newest token.
        page_size: tokens of a page, a power of two.
    """
    if ops.has_kernel(query):
        from tidaldecode.methods.quest_kernel import launch

        with torch.cuda.device(query.device):
            return launch(query, kv, bounds, scores, page_size)
    for b, length in enumerate(kv.lengths.tolist()):
        block, last = int(kv.block_table[b, 0]), (length - 1) // page_size
        rows = kv.k[block, last * page_size : length]  # [tokens, Hkv, D]
        newest = torch.stack([rows.amin(0), rows.amax(0)], 1)[:, None]  # [Hkv, 1, 2, D]
        if length % page_size == 0:
            bounds[block, :, last] = newest[:, 0]
        q = query[b].view(len(newest), -1, query.shape[2])  # [Hkv, G, D]
        scores[b, :, :last] = _upper_bounds(q, bounds[block, :, :last])
        scores[b, :, last : last + 1] = _upper_bounds(q, newest)
    return None


def _upper_bounds(query: Tensor, bounds: Tensor) -> Tensor:
    """Of the scores of queries [Hkv, G, D] in pages [Hkv, pages, 2, D]: [Hkv, pages]."""
    low, high = bounds.float().unbind(2)
    return (query.float().clamp(min=0) @ high.mT + query.float().clamp(max=0) @ low.mT).amax(1)
