"""Pages of the K cache: their bounds, and the bounds of their scores, in PyTorch and in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.ops import KV


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
        from tidaldecode.methods.pages_kernel import launch

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
