"""Codes of keys: written beside K, and scored instead of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.codes import STEPS
from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.scores import CODE_STEPS, Scores
from tidaldecode.ops.kernels.select import Choosing, tables_by_rule
from tidaldecode.ops.kernels.split_kv import cache_rows, stretch_of
from tidaldecode.ops.values import KV, Choice, KeyCodes

_TILE = 64  # tokens that a program scores at a time
_ROUNDS, _PROGRAMS = 2, 8
_STEPS = tl.constexpr(CODE_STEPS)
_LOG2_E = tl.constexpr(1.4426950408889634)


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


_BASES = {torch.bfloat16: 128, torch.float16: 1024, torch.float32: 0}


@triton.jit
def _as_numbers(u, BASE: tl.constexpr):
    """Small integers, uint16, as numbers: bfloat16 128 + u, float16 1024 + u or float32 u, by the base.

    Conversions are slow. So the integer becomes the last bits of a mantissa, behind the exponent at which they count
    as ones.
    """
    if BASE == 128:
        numbers = (u | 0x4300).to(tl.bfloat16, bitcast=True)
    elif BASE == 1024:
        numbers = (u | 0x6400).to(tl.float16, bitcast=True)
    else:
        numbers = u.to(tl.float32)
    return numbers


@triton.jit(do_not_specialize=["batch", "split_target", "turn", "window"])
def _score_kernel(
    query,  # [B, Hq, D], turned as the codes are
    packed,
    factors,
    block_table,
    lengths,  # [B]
    values,  # see `Scores`
    tops,
    normalizers,
    counts,
    budgets,
    turn,
    window,
    partial_normalizers,  # [slots, Hkv, G]
    tickets,
    scale,
    batch,
    split_target,
    query_b,
    query_h,
    packed_block,
    packed_row,
    packed_head,
    factors_block,
    factors_row,
    factors_head,
    table_b,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    CODED: tl.constexpr,
    COUNTS: tl.constexpr,
    MERGE_S: tl.constexpr,
    BASE: tl.constexpr,  # see `_as_numbers`
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = DIM * BITS // 8
    TILES: tl.constexpr = CHUNK // TILE
    SHARE: tl.constexpr = (COUNTS + HEADS - 1) // HEADS  # counters that each head's program clears
    head, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    busy, b, split, num_splits, first_slot, length, first_chunk = stretch_of(
        lengths, slot, batch, split_target, turn, window, BATCH, TILE, CHUNK
    )
    if not busy:
        return
    b64 = tl.cast(b, tl.int64)
    if split == 0:
        entry = tl.arange(0, triton.next_power_of_2(SHARE))
        cleared = (entry < SHARE) & (head * SHARE + entry < COUNTS)
        tl.store(counts + b64 * COUNTS + head * SHARE + entry, tl.zeros_like(entry), mask=cleared)
    if length <= tl.load(budgets + b):
        return
    table = block_table + b64 * table_b
    p_base, f_base = packed + head * packed_head, factors + head * factors_head
    if BLOCK == 0:
        block = tl.load(table).to(tl.int64)
        p_base += block * packed_block
        f_base += block * factors_block
    g, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    within = dims < DIM
    q_rows = query + b64 * query_b + (head * GROUP + g)[:, None] * query_h + dims[None, :]
    turned = tl.load(q_rows, mask=(g < GROUP)[:, None] & within[None, :], other=0.0)  # [G, D]
    # codes are odd integers, 2u + 1 - 2^bits
    offset = tl.sum(turned.to(tl.float32), 1) * (1.0 - 2.0**BITS - 2.0 * BASE)
    byte, shift = dims % WIDTH, (dims // WIDTH * BITS).to(tl.uint16)

    tiles = (length + TILE - 1) // TILE
    per_split = (tiles + num_splits - 1) // num_splits
    begin = split * per_split * TILE
    end = tl.minimum(begin + per_split * TILE, length)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < end
        token = tl.where(inside, token, 0)
        p_rows = cache_rows(token, table, packed_block, packed_row, BLOCK, WIDE)
        f_rows = cache_rows(token, table, factors_block, factors_row, BLOCK, WIDE)
        here = inside[:, None] & within[None, :]
        codes = tl.load(p_base + (p_rows[:, None] + byte[None, :]), mask=here, other=0)
        codes = _as_numbers((codes.to(tl.uint16) >> shift[None, :]) & (2**BITS - 1), BASE)
        factor = tl.load(f_base + f_rows, mask=inside, other=0.0).to(tl.float32)
        dots = tl.dot(turned, tl.trans(codes), input_precision=PRECISION)  # [G, T], float32
        scores = (2.0 * dots + offset[:, None]) * (factor * (scale * _LOG2_E))[None, :]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        place = ((first_chunk + start // CHUNK).to(tl.int64) * HEADS + head) * TILES + start % CHUNK // TILE
        place = place * GROUP + g
        pointers = values + (place * TILE)[:, None] + tl.arange(0, TILE)[None, :]
        real = g < GROUP
        if CODED:
            code = tl.minimum((new_top[:, None] - scores) * _STEPS + 0.5, 65535.0).to(tl.int32).to(tl.uint16)
            tl.store(pointers, code, mask=real[:, None])
            tl.store(tops + place, new_top, mask=real)
        else:
            tl.store(pointers, scores, mask=real[:, None])
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top

    normalizer = top + tl.log2(total)
    if num_splits > 1:
        tl.store(partial_normalizers + (slot * HEADS + head) * GROUP + g, normalizer, mask=g < GROUP)
        tl.debug_barrier()  # all threads' stores come before the ticket
        ticket = tickets + b * HEADS + head
        if tl.atomic_add(ticket, 1, sem="acq_rel") != num_splits - 1:
            return
        tl.store(ticket, 0)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, num_splits, MERGE_S):
            part = first + tl.arange(0, MERGE_S)
            rows = ((first_slot + part) * HEADS + head)[:, None] * GROUP + g[None, :]
            there = (part < num_splits)[:, None] & (g < GROUP)[None, :]
            # past the first-level cache: other multiprocessors wrote these
            piece = tl.load(partial_normalizers + rows, mask=there, other=float("-inf"), cache_modifier=".cg")
            new_top = tl.maximum(tl.maximum(top, tl.max(piece, 0)), -1e30)
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(piece - new_top[None, :]), 0)
            top = new_top
        normalizer = top + tl.log2(total)
    tl.store(normalizers + b64 * (HEADS * GROUP) + head * GROUP + g, normalizer, mask=g < GROUP)


def _score(query: Tensor, kv: KV, codes: KeyCodes, scale: float, scores: Scores, turn: int) -> None:
    """Writes the scores of one round, of queries that are turned as the codes are."""
    batch, num_heads, dim = query.shape
    kv_heads, block_size = codes.centres.shape[1], codes.packed.shape[1]
    group = num_heads // kv_heads
    programs = scratch.multiprocessors(query.device) * _PROGRAMS * (1 if batch == 1 else _ROUNDS)
    longest = triton.cdiv(block_size * kv.block_table.shape[1], _TILE)
    split_target = max(1, min(programs // kv_heads, batch * longest))
    slots = split_target + batch - 1
    overlap = scratch.overlaps(query.device)
    _score_kernel[kv_heads, slots](
        query,
        codes.packed,
        codes.factors,
        kv.block_table,
        kv.lengths,
        scores.values,
        scores.tops,
        scores.normalizers,
        scores.counts,
        scores.budgets,
        turn,
        scores.rounds.window,
        torch.empty(slots * num_heads, dtype=torch.float32, device=query.device),
        scratch.zeros("tickets", batch * kv_heads, query.device),
        scale,
        batch,
        split_target,
        *query.stride()[:2],
        *codes.packed.stride()[:3],
        *codes.factors.stride(),
        kv.block_table.stride(0),
        BITS=codes.bits,
        GROUP=group,
        HEADS=kv_heads,
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        TILE=_TILE,
        BATCH=scratch.padded(batch),
        BLOCK=0 if kv.block_table.shape[1] == 1 else block_size,
        WIDE=block_size * codes.packed.stride(1) >= 2**31,
        CHUNK=scores.rounds.tokens,
        CODED=scores.coded,
        COUNTS=scores.counts.shape[1],
        MERGE_S=32,
        BASE=_BASES[query.dtype],
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
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
    turned = (query.float() @ codes.rotation).to(query.dtype)  # once, not in each program
    tables = tables_by_rule(indices, selections, query.shape[1], kv.k.shape[2])
    choosing = Choosing(query, kv, choice, capacity, _TILE, list(tables.values()))
    for turn in range(choosing.scores.rounds.number):
        _score(turned, kv, codes, scale, choosing.scores, turn)
        choosing.choose(turn, kv.lengths)
