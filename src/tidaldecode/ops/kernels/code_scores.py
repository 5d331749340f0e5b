"""Scores of codes of keys, by products of 8-bit integers on the tensor cores.

A 32-bit word holds codes of as many channels as it has fields: one mask leaves four of them, a channel a byte, which
are an operand of the product as they stand. So a channel costs a third of an instruction, where to make a number of
each would cost ten. A row of the product holds the codes of `PAIR` tokens side by side, and a column a query head for
one of them, with zeros for the others: few query heads leave no column of the narrowest product (eight) idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.scores import CODE_STEPS, Scores
from tidaldecode.ops.kernels.split_kv import stretch_of
from tidaldecode.ops.values import KV, KeyCodes

_WARPS, _STAGES, _PROGRAMS = 1, 3, 16  # programs on a multiprocessor
_ROUNDS = 2
_LEAST_TILES = 4  # of a program: one warp merges what all programs of a sequence and head leave, one after another
_STEPS = tl.constexpr(CODE_STEPS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_INTEGERS = tl.constexpr(0x4B400000)  # bits of 1.5 · 2^23: an integer added to them is added to the number
_AS_NUMBER = tl.constexpr(12582912.0)


@triton.jit
def _turn_kernel(
    query,  # [B, Hq, D]
    rotation,  # [D, D]
    turned,  # [B, Hq, D], int8, written
    steps,  # [B, Hq], float32, written
    query_b,
    query_h,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(1).to(tl.int64)
    head, dims = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    there, within = head < HEADS, dims < DIM
    x = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        rows = query + b * query_b + head[:, None] * query_h + inner[None, :]
        q = tl.load(rows, mask=there[:, None] & (inner < DIM)[None, :], other=0.0).to(tl.float32)
        turn = rotation + inner[:, None] * DIM + dims[None, :]
        turn = tl.load(turn, mask=(inner < DIM)[:, None] & within[None, :], other=0.0)
        x = tl.dot(q, turn, x, input_precision=PRECISION)
    most = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    number = x * (127.0 / most)[:, None] + _AS_NUMBER  # rounds to the nearest integer, of two to the even one
    number = (number.to(tl.int32, bitcast=True) - _INTEGERS).to(tl.int8)
    rows = (b * HEADS + head)[:, None] * DIM + dims[None, :]
    tl.store(turned + rows, number, mask=there[:, None] & within[None, :])
    tl.store(steps + b * HEADS + head, most / 127.0, mask=there)


def turned_query(query: Tensor, codes: KeyCodes) -> tuple[Tensor, Tensor]:
    """As `codes.turned_query`, in one launch."""
    batch, heads, dim = query.shape
    turned = query.new_empty(query.shape, dtype=torch.int8)
    steps = query.new_empty(batch, heads, dtype=torch.float32)
    overlap = scratch.overlaps(query.device)
    _turn_kernel[triton.cdiv(heads, 16), batch](
        query,
        codes.rotation,
        turned,
        steps,
        *query.stride()[:2],
        HEADS=heads,
        DIM=dim,
        BLOCK_H=16,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_K=32,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32x3",
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=8,
    )
    return turned, steps


@triton.jit
def _plane(words, SHIFT: tl.constexpr, MASK: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Bits of each byte, int8; four bytes at once, which the compiler would take apart."""
    if ASSEMBLY:
        if SHIFT > 0:
            words = tl.inline_asm_elementwise(f"shr.b32 $0, $1, {SHIFT};", "=r,r", [words], tl.uint8, True, 4)
        bits = tl.inline_asm_elementwise(f"and.b32 $0, $1, {MASK * 0x01010101};", "=r,r", [words], tl.int8, True, 4)
    else:
        bits = ((words >> SHIFT) & MASK).to(tl.int8)
    return bits


@triton.jit(do_not_specialize=["batch", "split_target", "turn", "window"])
def _score_kernel(
    turned,  # [B, Hq, D], int8
    steps,  # [B, Hq]
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
    packed_block,
    packed_head,
    factors_block,
    factors_head,
    table_b,
    PACKED_ROW: tl.constexpr,
    FACTORS_ROW: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PAIR: tl.constexpr,
    TILE: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTS: tl.constexpr,
    MERGE_S: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    LEAST: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = DIM * BITS // 8
    BLOCK_W: tl.constexpr = triton.next_power_of_2(WIDTH)
    FIELDS: tl.constexpr = 8 // BITS
    FIELD: tl.constexpr = 2**BITS - 1
    COLUMNS: tl.constexpr = PAIR * BLOCK_G
    ROWS: tl.constexpr = TILE // PAIR
    TILES: tl.constexpr = CHUNK // TILE
    SHARE: tl.constexpr = (COUNTS + HEADS - 1) // HEADS  # counters that each head's program clears
    head, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    busy, b, split, num_splits, first_slot, length, first_chunk = stretch_of(
        lengths, slot, batch, split_target, turn, window, BATCH, TILE, CHUNK, LEAST
    )
    b64 = tl.cast(b, tl.int64)
    table = block_table + b64 * table_b
    p_base, f_base = packed + head * packed_head, factors + head * factors_head
    if BLOCK == 0:
        block = tl.load(table).to(tl.int64)
        p_base += block * packed_block
        f_base += block * factors_block
    budget = tl.load(budgets + b)
    column = tl.arange(0, COLUMNS)
    g, own = column % BLOCK_G, column // BLOCK_G  # the query head of a column, and which token of a row it scores
    real = g < GROUP
    byte = tl.arange(0, PAIR * BLOCK_W) % BLOCK_W
    of = tl.arange(0, PAIR * BLOCK_W) // BLOCK_W
    q_row = b64 * (HEADS * GROUP) + head * GROUP + g
    q_there = (of[:, None] == own[None, :]) & (byte < WIDTH)[:, None] & real[None, :]
    planes = ()
    sums = tl.zeros([COLUMNS], tl.int32)
    for field in tl.static_range(FIELDS):
        q = tl.load(turned + (q_row * DIM)[None, :] + (field * WIDTH + byte)[:, None], mask=q_there, other=0)
        sums += tl.sum(q.to(tl.int32), 0)
        planes = planes + (q,)  # type: ignore[assignment]  # noqa: RUF005
    # codes are odd integers, 2u + 1 - 2^BITS
    step = tl.load(steps + q_row, mask=real, other=0.0) * (scale * _LOG2_E)
    twice, offset = 2.0 * step, step * (sums * (1 - 2**BITS)).to(tl.float32)
    # all that was read so far was read at once: a return ahead of it would wait for the lengths
    if not busy:
        return
    if COUNTS > 0:  # noqa: SIM102 - known when it is compiled
        if split == 0:
            entry = tl.arange(0, triton.next_power_of_2(SHARE))
            cleared = (entry < SHARE) & (head * SHARE + entry < COUNTS)
            tl.store(counts + b64 * COUNTS + head * SHARE + entry, tl.zeros_like(entry), mask=cleared)
    if length <= budget:
        return

    tiles = (length + TILE - 1) // TILE
    per_split = (tiles + num_splits - 1) // num_splits
    begin = split * per_split * TILE
    end = tl.minimum(begin + per_split * TILE, length)
    row = tl.arange(0, ROWS)
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + row * PAIR  # the first of each row
        if BLOCK > 0:  # the tokens of a row lie in one block
            block = tl.load(table + token // BLOCK, mask=token < end, other=0).to(tl.int64)
            p_rows = block * packed_block + token % BLOCK * PACKED_ROW
            f_rows = block * factors_block + token % BLOCK * FACTORS_ROW
        else:
            place = token.to(tl.int64) if WIDE else token
            p_rows, f_rows = place * PACKED_ROW, place * FACTORS_ROW
        here = (token[:, None] + of[None, :] < end) & (byte < WIDTH)[None, :]
        words = tl.load(p_base + (p_rows[:, None] + (of * PACKED_ROW + byte)[None, :]), mask=here, other=0)
        # a mask by rows of several tokens, or eight rows of one: factors are read as vectors; room has so many more
        f_there = token < end if PAIR > 1 else token // 8 * 8 < end
        pair = tl.arange(0, PAIR)
        f_there = tl.broadcast_to(f_there[:, None], [ROWS, PAIR])
        factor = tl.load(f_base + (f_rows[:, None] + (pair * FACTORS_ROW)[None, :]), mask=f_there, other=0.0)
        low = tl.full([ROWS, COLUMNS], _INTEGERS, tl.int32)
        high = low
        for field in tl.static_range(FIELDS):
            if BITS == 4 or field % 2 == 0:
                low = tl.dot(_plane(words, field * BITS, FIELD, ASSEMBLY), planes[field], low, out_dtype=tl.int32)
            else:  # the bits stay where they are, and count 2^BITS times
                bits = _plane(words, field * BITS - BITS, FIELD << BITS, ASSEMBLY)
                high = tl.dot(bits, planes[field], high, out_dtype=tl.int32)
        scores = (low.to(tl.float32, bitcast=True) - _AS_NUMBER) * twice[None, :] + offset[None, :]
        if BITS < 4:
            scores += (high.to(tl.float32, bitcast=True) - _AS_NUMBER) * (twice * 0.5**BITS)[None, :]
        factor = tl.broadcast_to(factor.to(tl.float32)[:, :, None], [ROWS, PAIR, BLOCK_G])
        scores *= tl.reshape(factor, [ROWS, COLUMNS])
        scores = tl.where(token[:, None] + own[None, :] < end, scores, float("-inf"))
        # whole steps: so what a code stands for goes by its score alone, not by what the program saw before
        new_top = tl.maximum(top, tl.ceil(tl.max(scores, 0) * _STEPS) * (1.0 / _STEPS))
        # past 2^23 numbers are integers, and their last bits the code
        code = tl.minimum((new_top * _STEPS)[None, :] - scores * _STEPS, 65535.0) + 8388608.0
        tile = ((first_chunk + start // CHUNK).to(tl.int64) * HEADS + head) * TILES + start % CHUNK // TILE
        pointers = values + tile * (TILE * BLOCK_G) + (row[:, None] * COLUMNS + column[None, :])
        tl.store(pointers, code.to(tl.int32, bitcast=True).to(tl.uint16))
        tl.store(tops + tile * COLUMNS + column, new_top)
        shift = tl.maximum(new_top, -1e30)  # a column whose tokens are all past the end
        total = total * tl.exp2(top - shift)[None, :] + tl.exp2(scores - shift[None, :])
        top = new_top

    g = tl.arange(0, BLOCK_G)
    tops_of = tl.reshape(top, [PAIR, BLOCK_G])
    most = tl.maximum(tl.max(tops_of, 0), -1e30)
    totals = tl.reshape(tl.sum(total, 0), [PAIR, BLOCK_G]) * tl.exp2(tops_of - most[None, :])
    normalizer = most + tl.log2(tl.sum(totals, 0))
    if num_splits > 1:
        tl.store(partial_normalizers + (slot * HEADS + head) * GROUP + g, normalizer, mask=g < GROUP)
        tl.debug_barrier()  # all threads' stores come before the ticket
        ticket = tickets + b * HEADS + head
        if tl.atomic_add(ticket, 1, sem="acq_rel") != num_splits - 1:
            return
        tl.store(ticket, 0)
        normalizer = _merged(partial_normalizers, first_slot, num_splits, head, g, GROUP, HEADS, BLOCK_G, MERGE_S)
    tl.store(normalizers + b64 * (HEADS * GROUP) + head * GROUP + g, normalizer, mask=g < GROUP)


@triton.jit
def _merged(
    partial_normalizers,
    first_slot,
    num_splits,
    head,
    g,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MERGE_S: tl.constexpr,
):
    """The normalizers of a sequence, [G], from those of its stretches."""
    top = tl.full([BLOCK_G], -1e30, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, num_splits, MERGE_S):
        part = first + tl.arange(0, MERGE_S)
        rows = ((first_slot + part) * HEADS + head)[:, None] * GROUP + g[None, :]
        there = (part < num_splits)[:, None] & (g < GROUP)[None, :]
        # past the first-level cache: other multiprocessors wrote these
        piece = tl.load(partial_normalizers + rows, mask=there, other=float("-inf"), cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(piece, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(piece - new_top[None, :]), 0)
        top = new_top
    return top + tl.log2(total)


def score(turned: Tensor, steps: Tensor, kv: KV, codes: KeyCodes, scale: float, scores: Scores, turn: int) -> None:
    """Writes the scores of one round.

    Args:
        turned, steps: from `turned_query`.
        kv: the cache.
        codes: its codes.
        scale: factor of the scores.
        scores: written; with rows of `pair_of` tokens in tiles of `tile_of` them.
        turn: the round.
    """
    batch, num_heads, dim = turned.shape
    block_size, kv_heads = codes.packed.shape[1:3]
    paged = kv.block_table.shape[1] > 1
    if paged and block_size % scores.pair:
        raise ValueError(f"blocks of {block_size} tokens: codes are scored in blocks of a multiple of {scores.pair}")
    group = num_heads // kv_heads
    programs = scratch.multiprocessors(turned.device) * _PROGRAMS * (1 if batch == 1 else _ROUNDS)
    longest = triton.cdiv(block_size * kv.block_table.shape[1], scores.tile)
    split_target = max(1, min(programs // kv_heads, triton.cdiv(batch * longest, _LEAST_TILES)))
    slots = split_target + batch - 1
    block_g = scores.values.shape[4] // scores.pair
    overlap = scratch.overlaps(turned.device)
    _score_kernel[kv_heads, slots](
        turned,
        steps,
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
        torch.empty(slots * num_heads, dtype=torch.float32, device=turned.device),
        scratch.zeros("tickets", batch * kv_heads, turned.device),
        scale,
        batch,
        split_target,
        codes.packed.stride(0),
        codes.packed.stride(2),
        codes.factors.stride(0),
        codes.factors.stride(2),
        kv.block_table.stride(0),
        PACKED_ROW=codes.packed.stride(1),
        FACTORS_ROW=codes.factors.stride(1),
        BITS=codes.bits,
        GROUP=group,
        HEADS=kv_heads,
        DIM=dim,
        BLOCK_G=block_g,
        PAIR=scores.pair,
        TILE=scores.tile,
        BATCH=scratch.padded(batch),
        BLOCK=block_size if paged else 0,
        WIDE=block_size * codes.packed.stride(1) >= 2**31,
        CHUNK=scores.rounds.tokens,
        COUNTS=scores.counts.shape[1],
        MERGE_S=max(16, min(triton.next_power_of_2(split_target), 1024 // block_g)),
        ASSEMBLY=turned.is_cuda,
        LEAST=_LEAST_TILES,
        STAGES=_STAGES,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=_WARPS,
    )
