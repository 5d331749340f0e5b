"""vLLM's KV cache as our operations see it: K and V apart, [num_blocks, block_size, Hkv, D] each, without a copy."""

from __future__ import annotations

from torch import Tensor


def cache_views(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a layer, on any device.

    Args:
        kv_cache: [num_blocks, Hkv, block_size, 2 · D], in any order of the first three in memory.
    """
    return packed_views(kv_cache) if kv_cache.device.type == "cpu" else row_views(kv_cache)


def row_views(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token's K and then its V lie in a row, as on a GPU; see `cache_views`."""
    rows, dim = kv_cache.transpose(1, 2), kv_cache.shape[3] // 2
    return rows[..., :dim], rows[..., dim:]


def packed_views(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Where a head's part of a block holds all its K, [D, block_size], and then its V, [block_size, D]: on a CPU."""
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * width // 2)
    k_cache = halves[:, :, 0].view(num_blocks, num_kv_heads, width // 2, block_size)
    v_cache = halves[:, :, 1].view(num_blocks, num_kv_heads, block_size, width // 2)
    return k_cache.permute(0, 3, 1, 2), v_cache.transpose(1, 2)
