"""Writes the K and V of new tokens into the cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.write_codes import write_codes
from tidaldecode.ops.values import KV, check_rows


@triton.jit
def _write_kernel(
    key,  # [B, N, Hkv, D]
    value,
    k_cache,
    v_cache,
    block_table,
    lengths,  # [B]
    new_lengths,  # [B]
    queries,
    block_size,
    key_b,
    key_n,
    key_h,
    value_b,
    value_n,
    value_h,
    k_block,
    k_row,
    k_head,
    v_block,
    v_row,
    v_head,
    table_b,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if n < queries - tl.load(new_lengths + b):  # left padding
        return
    token = tl.load(lengths + b) - queries + n
    block = tl.load(block_table + b * table_b + token // block_size).to(tl.int64)
    row = (token % block_size).to(tl.int64)
    heads = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    dims = tl.arange(0, BLOCK_D)[None, :]
    real = (heads < HEADS) & (dims < DIM)
    n64 = n.to(tl.int64)
    k = tl.load(key + b * key_b + n64 * key_n + heads * key_h + dims, mask=real)
    v = tl.load(value + b * value_b + n64 * value_n + heads * value_h + dims, mask=real)
    tl.store(k_cache + block * k_block + row * k_row + heads * k_head + dims, k, mask=real)
    tl.store(v_cache + block * v_block + row * v_row + heads * v_head + dims, v, mask=real)


def write_kv(key: Tensor, value: Tensor, kv: KV, new_lengths: Tensor) -> None:
    """As `reference.write_kv`."""
    check_rows(key=key, value=value, new_lengths=new_lengths)
    batch, queries, heads, dim = key.shape
    if kv.codes is not None and queries == 1:
        write_codes(kv, new_lengths, batch, key[:, 0], value[:, 0])
        return
    _write_kernel[queries, batch](
        key,
        value,
        kv.k,
        kv.v,
        kv.block_table,
        kv.lengths,
        new_lengths,
        queries,
        kv.k.shape[1],
        *key.stride()[:3],
        *value.stride()[:3],
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        kv.block_table.stride(0),
        HEADS=heads,
        BLOCK_H=triton.next_power_of_2(heads),
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        OVERLAP=scratch.overlaps(key.device),
        launch_pdl=scratch.overlaps(key.device),
    )
    if kv.codes is not None:
        write_codes(kv, new_lengths, batch * queries)
