"""Codes of keys, written for the keys that are in the cache, or with the K and V of a decode step's tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.codes import CENTRE_TOKENS, STEPS
from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.values import KV, check_rows


@triton.jit
def _share_of(lengths, new_lengths, slot, batch, BATCH: tl.constexpr, CENTRE: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a program codes: (whether anything, sequence, its length, the first and the last token).

    A sequence's new tokens, or all of one that had no whole centre before.
    """
    index = tl.arange(0, BATCH)
    length = tl.load(lengths + index, mask=index < batch, other=0)
    new = tl.load(new_lengths + index, mask=index < batch, other=0)
    start = tl.where(length - new < CENTRE, 0, length - new)
    behind = tl.cumsum(tl.where(new > 0, (length - start + BLOCK_N - 1) // BLOCK_N, 0), 0)
    b = tl.sum((behind <= slot).to(tl.int32))
    busy = b < batch
    b = tl.minimum(b, batch - 1)
    mine = index == b
    end = tl.sum(tl.where(mine, length, 0))
    start = tl.sum(tl.where(mine, start, 0))
    before = tl.sum(tl.where(mine, behind, 0)) - (end - start + BLOCK_N - 1) // BLOCK_N
    return busy, tl.cast(b, tl.int64), end, start + (slot - before) * BLOCK_N


@triton.jit(do_not_specialize=["batch"])
def _write_kernel(
    key,  # [B, Hkv, D], of the last token of each sequence; with STEP it is written into the cache here
    value,
    k_cache,
    v_cache,
    packed,
    factors,
    rotation,  # [D, D]
    steady,  # [D]
    block_table,
    lengths,  # [B]
    new_lengths,  # [B]
    step,  # of the quantizer, for a variance of 1
    batch,
    block_size,
    key_b,
    key_h,
    value_b,
    value_h,
    k_block,
    k_row,
    k_head,
    v_block,
    v_row,
    v_head,
    packed_block,
    packed_row,
    packed_head,
    factors_block,
    factors_row,
    factors_head,
    table_b,
    HEADS: tl.constexpr,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BATCH: tl.constexpr,
    CENTRE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    FIELDS: tl.constexpr = 8 // BITS
    HALF: tl.constexpr = 2 ** (BITS - 1)
    head, slot = (tl.program_id(0) % HEADS).to(tl.int64), tl.program_id(0) // HEADS
    busy, b, length, start = _share_of(lengths, new_lengths, slot, batch, BATCH, CENTRE, BLOCK_N)
    if not busy:
        return
    dims = tl.arange(0, BLOCK_D)
    within = dims < DIM
    table = block_table + b * table_b
    token = start + tl.arange(0, BLOCK_N)
    real = token < length
    token = tl.where(real, token, 0)
    block = tl.load(table + token // block_size, mask=real, other=0).to(tl.int64)
    row = (token % block_size).to(tl.int64)
    first = tl.arange(0, CENTRE)
    there = first < length
    first_rows = tl.load(table + first // block_size, mask=there, other=0).to(tl.int64) * k_block
    first_rows = k_cache + (first_rows + first % block_size * k_row + head * k_head)
    rows = k_cache + (block * k_block + row * k_row + head * k_head)
    if STEP:  # the cache does not hold the last token yet
        new_row = key + b * key_b + head * key_h
        first_rows = tl.where(first == length - 1, new_row, first_rows)
        rows = tl.where(token == length - 1, new_row, rows)
        last_block = tl.load(table + (length - 1) // block_size).to(tl.int64)
        last_row = ((length - 1) % block_size).to(tl.int64)
        new_v = tl.load(value + b * value_b + head * value_h + dims, mask=within)
        tl.store(
            k_cache + last_block * k_block + last_row * k_row + head * k_head + dims,
            tl.load(new_row + dims, mask=within),
            mask=within,
        )
        tl.store(v_cache + last_block * v_block + last_row * v_row + head * v_head + dims, new_v, mask=within)
    # columns in the order of packing: the codes of a byte side by side
    column = dims % FIELDS * (DIM // FIELDS) + dims // FIELDS
    turned = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for begin in range(0, DIM, BLOCK_K):  # the whole rotation would not fit shared memory where head dims are large
        inner = begin + tl.arange(0, BLOCK_K)
        exists = inner < DIM
        firsts = tl.load(first_rows[:, None] + inner[None, :], mask=there[:, None] & exists[None, :], other=0.0)
        centre = tl.sum(firsts.to(tl.float32), 0) / tl.minimum(length, CENTRE)
        centre *= tl.load(steady + inner, mask=exists, other=0.0)
        k = tl.load(rows[:, None] + inner[None, :], mask=real[:, None] & exists[None, :], other=0.0)
        k = k.to(tl.float32) - centre[None, :]
        turn_rows = rotation + inner[:, None] * DIM + column[None, :]
        turn = tl.load(turn_rows, mask=exists[:, None] & within[None, :], other=0.0)
        turned = tl.dot(k, turn, turned, input_precision=PRECISION)  # [N, D]
    norm = tl.sum(turned * turned, 1)
    code = tl.floor(turned / tl.maximum(tl.sqrt(norm / DIM) * step, 1e-30)[:, None]) + HALF
    code = tl.minimum(tl.maximum(code, 0.0), 2.0 * HALF - 1.0)
    along = tl.sum(tl.where(within[None, :], turned * (2.0 * code + (1.0 - 2.0 * HALF)), 0.0), 1)
    factor = tl.where(norm > 0, norm / tl.where(norm > 0, along, 1.0), 0.0)
    fields = tl.reshape(code.to(tl.int32), [BLOCK_N, BLOCK_D // FIELDS, FIELDS])
    bytes_ = tl.sum(fields << (tl.arange(0, FIELDS) * BITS)[None, None, :], 2)  # [N, W]
    w = tl.arange(0, BLOCK_D // FIELDS)
    place = packed + block * packed_block + row * packed_row + head * packed_head
    tl.store(place[:, None] + w[None, :], bytes_.to(tl.uint8), mask=real[:, None] & (w < DIM // FIELDS)[None, :])
    tl.store(
        factors + block * factors_block + row * factors_row + head * factors_head, factor.to(tl.float16), mask=real
    )


def write_codes(
    kv: KV, new_lengths: Tensor, tokens: int, key: Tensor | None = None, value: Tensor | None = None
) -> None:
    """As `codes.write_codes`.

    Args:
        key, value: [B, Hkv, D]; the K and V of a decode step's tokens, one for each sequence, to be written as well.
    """
    codes = kv.codes
    assert codes is not None
    check_rows(new_lengths=new_lengths)
    _, block_size, heads, dim = kv.k.shape
    batch = len(kv.lengths)
    block_n = 16 if tokens <= 16 * batch or dim > 128 else 64  # what fits the shared memory of smaller GPUs
    # a sequence of n new tokens takes at most n programs, and at most those of 15 more tokens
    slots = min(tokens, (tokens + batch * (block_n + CENTRE_TOKENS - 2)) // block_n)
    overlap = scratch.overlaps(kv.k.device)
    strides = (0,) * 4 if key is None or value is None else (*key.stride()[:2], *value.stride()[:2])
    _write_kernel[heads * slots,](  # one axis: others end at 65,535, which long prompts exceed
        kv.k if key is None else key,
        kv.v if value is None else value,
        kv.k,
        kv.v,
        codes.packed,
        codes.factors,
        codes.rotation,
        codes.steady,
        kv.block_table,
        kv.lengths,
        new_lengths,
        STEPS[codes.bits],
        batch,
        block_size,
        *strides,
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        *codes.packed.stride()[:3],
        *codes.factors.stride(),
        kv.block_table.stride(0),
        HEADS=heads,
        BITS=codes.bits,
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_N=block_n,
        BLOCK_K=32,
        BATCH=scratch.padded(batch),
        CENTRE=CENTRE_TOKENS,
        STEP=key is not None,
        PRECISION="ieee" if kv.k.dtype == torch.float32 else "tf32",
        OVERLAP=overlap,
        launch_pdl=overlap,
    )
