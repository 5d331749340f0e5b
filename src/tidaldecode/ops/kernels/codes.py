"""Codes of keys: written beside K, and scored instead of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.codes import STEPS
from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.code_scores import pair_of, score, tile_of, turned_query
from tidaldecode.ops.kernels.select import Choosing, tables_by_rule
from tidaldecode.ops.values import KV, Choice


@triton.jit
def _write_kernel(
    key,  # [B, N, Hkv, D]
    packed,
    factors,
    centres,  # [B, Hkv, D]
    rotation,  # [D, D]
    block_table,
    lengths,  # [B]
    new_lengths,  # [B]
    step,  # of the quantizer, for a variance of 1
    queries,
    block_size,
    key_b,
    key_n,
    key_h,
    centres_b,
    centres_h,
    packed_block,
    packed_row,
    packed_head,
    factors_block,
    factors_row,
    factors_head,
    table_b,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    FIELDS: tl.constexpr = 8 // BITS
    HALF: tl.constexpr = 2 ** (BITS - 1)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (n < queries) & (n >= queries - tl.load(new_lengths + b))  # no left padding
    dims = tl.arange(0, BLOCK_D)
    within = dims < DIM
    rows = key + b * key_b + n.to(tl.int64)[:, None] * key_n + head * key_h
    # columns in the order of packing: the codes of a byte side by side
    column = dims % FIELDS * (DIM // FIELDS) + dims // FIELDS
    turned = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, DIM, BLOCK_K):  # the whole rotation would not fit shared memory where head dims are large
        inner = start + tl.arange(0, BLOCK_K)
        there = inner < DIM
        k = tl.load(rows + inner[None, :], mask=real[:, None] & there[None, :], other=0.0).to(tl.float32)
        k -= tl.load(centres + b * centres_b + head * centres_h + inner, mask=there, other=0.0)[None, :]
        turn_rows = rotation + inner[:, None] * DIM + column[None, :]
        turn = tl.load(turn_rows, mask=there[:, None] & within[None, :], other=0.0)
        turned = tl.dot(k, turn, turned, input_precision=PRECISION)  # [N, D]
    norm = tl.sum(turned * turned, 1)
    code = tl.floor(turned / tl.maximum(tl.sqrt(norm / DIM) * step, 1e-30)[:, None]) + HALF
    code = tl.minimum(tl.maximum(code, 0.0), 2.0 * HALF - 1.0)
    along = tl.sum(tl.where(within[None, :], turned * (2.0 * code + (1.0 - 2.0 * HALF)), 0.0), 1)
    factor = tl.where(norm > 0, norm / tl.where(norm > 0, along, 1.0), 0.0)
    fields = tl.reshape(code.to(tl.int32), [BLOCK_N, BLOCK_D // FIELDS, FIELDS])
    bytes_ = tl.sum(fields << (tl.arange(0, FIELDS) * BITS)[None, None, :], 2)  # [N, W]

    token = tl.load(lengths + b) - queries + n
    token = tl.where(real, token, 0)
    block = tl.load(block_table + b * table_b + token // block_size, mask=real, other=0).to(tl.int64)
    row = (token % block_size).to(tl.int64)
    w = tl.arange(0, BLOCK_D // FIELDS)
    place = packed + block * packed_block + row * packed_row + head * packed_head
    tl.store(place[:, None] + w[None, :], bytes_.to(tl.uint8), mask=real[:, None] & (w < DIM // FIELDS)[None, :])
    tl.store(
        factors + block * factors_block + row * factors_row + head * factors_head, factor.to(tl.float16), mask=real
    )


def write_codes(key: Tensor, kv: KV, new_lengths: Tensor) -> None:
    """The codes of `reference.write_kv`."""
    codes = kv.codes
    assert codes is not None
    batch, queries, heads, dim = key.shape
    block_n = 16 if queries <= 16 or dim > 128 else 64  # what fits the shared memory of smaller GPUs
    overlap = scratch.overlaps(key.device)
    _write_kernel[triton.cdiv(queries, block_n), heads, batch](
        key,
        codes.packed,
        codes.factors,
        codes.centres,
        codes.rotation,
        kv.block_table,
        kv.lengths,
        new_lengths,
        STEPS[codes.bits],
        queries,
        kv.k.shape[1],
        *key.stride()[:3],
        *codes.centres.stride()[:2],
        *codes.packed.stride()[:3],
        *codes.factors.stride(),
        kv.block_table.stride(0),
        BITS=codes.bits,
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_N=block_n,
        BLOCK_K=32,
        PRECISION="ieee" if key.dtype == torch.float32 else "tf32",
        OVERLAP=overlap,
        launch_pdl=overlap,
    )


def choose_by_codes(
    query: Tensor,
    kv: KV,
    scale: float,
    selections: Sequence[str],
    choice: Choice,
    capacity: int,
    indices: Tensor,
) -> None:
    """As `reference.choose_by_codes`; ties as in `full_attention_with_selection`."""
    codes = kv.codes
    assert codes is not None
    tables = tables_by_rule(indices, selections, query.shape[1], kv.k.shape[2])
    pair = pair_of(codes, query.shape[1] // kv.k.shape[2])
    choosing = Choosing(query, kv, choice, capacity, tile_of(pair), list(tables.values()), pair)
    turned = turned_query(query, codes)
    for turn in range(choosing.scores.rounds.number):
        score(*turned, kv, codes, scale, choosing.scores, turn)
        choosing.choose(turn, kv.lengths)
