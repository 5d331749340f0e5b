"""Pages of the K cache: their bounds, and the bounds of their scores, in PyTorch and in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from tidaldecode import ops


def page_bounds(k_cache: Tensor, block_table: Tensor, page_size: int) -> Tensor:
    """The smallest and the largest value of every channel of K in each page.

    Args:
        k_cache: [num_blocks, block_size, Hkv, D], see `tidaldecode.ops`.
        block_table: [B, 1]; the contiguous cache.
        page_size: tokens of a page.

    Returns:
        [B, Hkv, pages, 2, D], dtype of `k_cache`; of pages that are not full yet undefined.
    """
    batch, (_, tokens, heads, dim) = len(block_table), k_cache.shape
    pages, full = -(-tokens // page_size), tokens // page_size
    bounds = k_cache.new_zeros(batch, heads, pages, 2, dim)
    for b, block in enumerate(block_table[:, 0].tolist()):  # one sequence at a time: a cache can be most of a GPU
        paged = k_cache[block, : full * page_size].reshape(full, page_size, heads, dim)
        bounds[b, :, :full, 0] = paged.amin(1).transpose(0, 1)
        bounds[b, :, :full, 1] = paged.amax(1).transpose(0, 1)
    return bounds


def page_scores(
    query: Tensor, k_cache: Tensor, block_table: Tensor, lengths: Tensor, bounds: Tensor, scores: Tensor, page_size: int
) -> None:
    """Writes an upper bound of the scores in each page, and brings the bounds of the newest page up to date.

    With `m` and `M` the bounds of a page, `q · k <= Σ_d max(q_d m_d, q_d M_d)` for all its tokens; of the query heads
    of a KV head the largest counts.

    Args:
        query: [B, Hq, D].
        k_cache, block_table, lengths: the cache; contiguous, the new token included.
        bounds: [B, Hkv, pages, 2, D], see `page_bounds`; the page of the newest token is written.
        scores: [B, Hkv, pages], float32, written up to the page of the newest token.
        page_size: tokens of a page, a power of two.
    """
    if ops.has_kernel(query):
        from tidaldecode.baselines.pages_kernel import launch

        with torch.cuda.device(query.device):
            return launch(query, k_cache, block_table, lengths, bounds, scores, page_size)
    for b, length in enumerate(lengths.tolist()):
        last = (length - 1) // page_size
        newest = k_cache[int(block_table[b, 0]), last * page_size : length]  # [tokens, Hkv, D]
        bounds[b, :, last, 0], bounds[b, :, last, 1] = newest.amin(0), newest.amax(0)
        low, high = bounds[b, :, : last + 1].float().unbind(2)  # [Hkv, pages, D]
        q = query[b].float().view(len(low), -1, query.shape[2])  # [Hkv, G, D]
        upper = q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT
        scores[b, :, : last + 1] = upper.amax(1)
    return None
