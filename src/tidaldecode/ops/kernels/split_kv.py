"""Attention of a few new tokens per sequence over many cached ones, split over the KV length, in one launch.

Every attention operation of a decode step is this kernel: over the whole cache or over a table of index sets, for one
new token or several, with or without the scores that selection needs. A program reads one stretch of one sequence for
all query heads that share its K and V, as in Flash-Decoding (Dao et al. 2023); the last program of a sequence and head
to finish merges the stretches, so there is no second launch to wait for. How long a stretch is follows from the
lengths on the device: long sequences get more programs, and a captured CUDA graph stays right as they grow. (Where few
KV heads leave very many stretches, `merge` has them.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidaldecode.ops.kernels.scores import CODE_STEPS

_STEPS = tl.constexpr(CODE_STEPS)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def stretch_of(
    lengths,
    slot,
    batch,
    split_target,
    turn,
    window,
    BATCH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
    LEAST: tl.constexpr,  # tiles of a stretch
):
    """What a slot works on.

    (whether anything, sequence, split, splits of the sequence, their first slot, length, its first chunk in the round)
    """
    first_chunk = 0
    if BATCH == 1:  # no sums over the batch to wait for
        mine_length = tl.load(lengths)
        tiles = (mine_length + BLOCK_T - 1) // BLOCK_T
        stretch = tl.maximum((tiles + split_target - 1) // split_target, LEAST)  # tiles a program
        num_splits = tl.maximum((tiles + stretch - 1) // stretch, 1)
        busy, b, first = slot < num_splits, 0, 0
    else:
        index = tl.arange(0, BATCH)
        length = tl.load(lengths + index, mask=index < batch, other=0)
        mine = index < batch
        if CHUNK > 0:  # the sequences of this round alone, see `chunks`
            chunks = (length + CHUNK - 1) // CHUNK
            chunks_before = tl.cumsum(chunks, 0) - chunks
            mine = mine & (chunks_before // window == turn)
            length = tl.where(mine, length, 0)
        tiles = (length + BLOCK_T - 1) // BLOCK_T
        stretch = tl.maximum((tl.sum(tiles) + split_target - 1) // split_target, LEAST)
        splits = tl.where(mine, tl.maximum((tiles + stretch - 1) // stretch, 1), 0)
        behind = tl.cumsum(splits, 0)
        b = tl.sum((behind <= slot).to(tl.int32))
        busy = b < batch
        b = tl.minimum(b, batch - 1)
        num_splits = tl.sum(tl.where(index == b, splits, 0))
        first = tl.sum(tl.where(index == b, behind, 0)) - num_splits
        mine_length = tl.sum(tl.where(index == b, length, 0))
        if CHUNK > 0:
            first_chunk = tl.sum(tl.where(index == b, chunks_before, 0)) - turn * window
    return busy, b, slot - first, num_splits, first, mine_length, first_chunk


@triton.jit
def cache_rows(tokens, block_table, block_stride, row_stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the cache rows of tokens, from the block on if there is only one; int64 where int32 is too small."""
    if BLOCK == 0:
        rows = (tokens.to(tl.int64) if WIDE else tokens) * row_stride
    else:
        block = tl.load(block_table + tokens // BLOCK).to(tl.int64)
        rows = block * block_stride + tokens % BLOCK * row_stride
    return rows


@triton.jit
def _first_half(rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The first half of the rows of a matrix, or of a vector (`WIDTH` of 0)."""
    if WIDTH == 0:
        halves = tl.reshape(rows, [2, ROWS // 2])
        first = (tl.arange(0, 2) == 0)[:, None]
    else:
        halves = tl.reshape(rows, [2, ROWS // 2, WIDTH])
        first = (tl.arange(0, 2) == 0)[:, None, None]
    return tl.sum(tl.where(first, halves, 0.0), 0)


@triton.jit(do_not_specialize=["batch", "split_target", "turn", "window"])  # else compiled anew for some batches
def attend_kernel(
    query,  # [B, N, Hq, D]
    k_cache,
    v_cache,
    block_table,
    lengths,  # [B], tokens to read; with SPARSE [S, B], of each set
    new_lengths,  # [B]; with QUERIES > 1
    indices,  # [B, S, K]; with SPARSE
    head_to_set,
    output,  # [B, N, Hq, D]
    scores,  # of the first new token; with CHUNK > 0, see `Scores`
    tops,
    normalizers,  # [B, Hq]
    counts,  # [B, COUNTS], int32, written: zeros
    budgets,  # [B]; with CHUNK > 0: a shorter sequence needs no scores
    turn,
    window,
    partials,  # [slots, HEADS, rows, D], float32: attention over a stretch
    partial_normalizers,  # [slots, HEADS, rows], float32, base 2
    tickets,  # [B, HEADS, row tiles], int32, zero before and after
    scale,
    batch,
    split_target,
    query_b,
    query_n,
    query_h,
    k_block,
    k_row,
    k_head,
    v_block,
    v_row,
    v_head,
    table_b,
    output_b,
    output_n,
    output_h,
    indices_b,
    indices_s,
    lengths_s,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that a program serves
    HEADS: tl.constexpr,  # programs side by side: KV heads, or query heads with an index set each
    PER_KV_HEAD: tl.constexpr,  # of which so many read one KV head
    ONE_SET: tl.constexpr,
    MAPPED: tl.constexpr,  # `head_to_set` says which set a head reads
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MERGE_M: tl.constexpr,
    MERGE_S: tl.constexpr,
    APART: tl.constexpr,  # stretches are merged by `merge_kernel`
    BATCH: tl.constexpr,
    PAGE: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a block; 0 for one block per sequence
    SAME_ROWS: tl.constexpr,  # K and V have the same strides
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,  # tokens of a chunk of scores; 0 if none are wanted
    CODED: tl.constexpr,
    COUNTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    ROWS: tl.constexpr = QUERIES * GROUP
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    EVICTION: tl.constexpr = "evict_first" if CHUNK > 0 else ""  # the L2 cache is for scores, which are read again
    SHARE: tl.constexpr = (COUNTS + HEADS - 1) // HEADS  # counters that each head's program clears
    SHARE_2: tl.constexpr = triton.next_power_of_2(SHARE)
    head, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    slot = tl.program_id(1)
    if SPARSE:
        chosen = tl.cast(0 if ONE_SET else head, tl.int64)
        if MAPPED:
            chosen = tl.load(head_to_set + chosen).to(tl.int64)
        lengths += chosen * lengths_s
    busy, b, split, num_splits, first_slot, length, first_chunk = stretch_of(
        lengths, slot, batch, split_target, turn, window, BATCH, BLOCK_T, CHUNK, 1
    )
    b64 = tl.cast(b, tl.int64)
    table = block_table + b64 * table_b
    kv_head = tl.cast(head // PER_KV_HEAD, tl.int64)
    k_base, v_base = k_cache + kv_head * k_head, v_cache + kv_head * v_head
    if BLOCK == 0:
        block = tl.load(table).to(tl.int64)
        k_base += block * k_block
        v_base += block * v_block
    if SPARSE:
        chosen_set = indices + b64 * indices_b + chosen * indices_s
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_pointers = query + b64 * query_b + (row // GROUP) * query_n + (head * GROUP + row % GROUP) * query_h
    real = (row < ROWS)[:, None] & (dims < DIM)[None, :]
    if CHUNK > 0:
        first_new = QUERIES - tl.load(new_lengths + b) if QUERIES > 1 else 0
        # where half of the rows hold all heads, the other half is not worth the work
        HALVED: tl.constexpr = QUERIES == 1 and BLOCK_M == 16 and GROUP <= 8
        s_row = tl.arange(0, BLOCK_M // 2) if HALVED else row
        s_there = (s_row < tl.where(length > tl.load(budgets + b), ROWS, 0)) & (s_row // GROUP == first_new)
        TILES: tl.constexpr = CHUNK // BLOCK_T
    q = tl.load(q_pointers[:, None] + dims[None, :], mask=real, other=0.0)  # [M, D]
    if not busy:
        return
    if COUNTS > 0:  # noqa: SIM102 - known when it is compiled: without counters there is no range of them
        if (split == 0) & (row_tile == 0):
            entry = head * SHARE + tl.arange(0, SHARE_2)
            cleared = (tl.arange(0, SHARE_2) < SHARE) & (entry < COUNTS)
            tl.store(counts + b64 * COUNTS + entry, tl.zeros([SHARE_2], tl.int32), mask=cleared)

    tiles = (length + BLOCK_T - 1) // BLOCK_T
    per_split = (tiles + num_splits - 1) // num_splits
    begin = split * per_split * BLOCK_T
    end = tl.minimum(begin + per_split * BLOCK_T, length)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        entry = start + tl.arange(0, BLOCK_T)
        inside = entry < end
        if SPARSE:
            token = tl.load(chosen_set + entry // PAGE, mask=inside, other=0)
            if PAGE > 1:
                token = token * PAGE + entry % PAGE
        else:
            token = entry
        if BLOCK > 0:
            token = tl.where(inside, token, 0)
        k_rows = cache_rows(token, table, k_block, k_row, BLOCK, WIDE)
        v_rows = k_rows if SAME_ROWS else cache_rows(token, table, v_block, v_row, BLOCK, WIDE)
        here = inside[:, None] if BLOCK_D == DIM else inside[:, None] & (dims < DIM)[None, :]
        k_pointers, v_pointers = k_base + (k_rows[:, None] + dims[None, :]), v_base + (v_rows[:, None] + dims[None, :])
        k = tl.load(k_pointers, mask=here, other=0.0, eviction_policy=EVICTION)  # [T, D]
        v = tl.load(v_pointers, mask=here, other=0.0, eviction_policy=EVICTION)
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, T], float32
        visible = inside[None, :]
        if QUERIES > 1:  # the newest token that each row may see
            visible = visible & (token[None, :] <= (length - QUERIES + row // GROUP)[:, None])
        logits = tl.where(visible, dots * (scale * _LOG2_E), float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if QUERIES > 1 else new_top
        if CHUNK > 0:
            s_tile = ((first_chunk + start // CHUNK).to(tl.int64) * HEADS + head) * TILES + start % CHUNK // BLOCK_T
            s_place = s_tile * GROUP + s_row % GROUP
            s_score = _first_half(logits, BLOCK_M, BLOCK_T) if HALVED else logits
            s_top = _first_half(shift, BLOCK_M, 0) if HALVED else shift
            s_pointers = scores + (s_place * BLOCK_T)[:, None] + tl.arange(0, BLOCK_T)[None, :]
            if CODED:  # also past the length, in whole vectors: a store for each score would take as long as the reads
                # past 2^23 numbers are integers, and their last bits the code: a conversion would be slow
                number = tl.minimum((s_top[:, None] - s_score) * _STEPS, 65535.0) + 8388608.0
                code = number.to(tl.int32, bitcast=True).to(tl.uint16)
                tl.store(s_pointers, code, mask=s_there[:, None], eviction_policy="evict_last")
                tl.store(tops + s_place, s_top, mask=s_there)
            else:
                tl.store(s_pointers, s_score, mask=s_there[:, None], eviction_policy="evict_last")
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top

    # a row that saw nothing: no weight, zeros
    result = acc * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    normalizer = top + tl.log2(total)
    o_base = output + b64 * output_b
    if num_splits > 1:
        p_rows = (slot * HEADS + head) * ROWS + row
        tl.store(partials + (p_rows * DIM)[:, None] + dims[None, :], result, mask=real)
        tl.store(partial_normalizers + p_rows, normalizer, mask=row < ROWS)
        if APART:
            return
        tl.debug_barrier()  # all threads' stores come before the ticket
        ticket = tickets + (b * HEADS + head) * ROW_TILES + row_tile
        if tl.atomic_add(ticket, 1, sem="acq_rel") == num_splits - 1:
            tl.store(ticket, 0)
            m_row = row_tile * BLOCK_M + tl.arange(0, MERGE_M)
            merged, m_normalizer = _merge(
                partials,
                partial_normalizers,
                first_slot,
                num_splits,
                head,
                m_row,
                HEADS,
                ROWS,
                DIM,
                BLOCK_D,
                MERGE_M,
                MERGE_S,
            )
            if QUERIES > 1:
                merged = tl.where((m_row // GROUP >= QUERIES - tl.load(new_lengths + b))[:, None], merged, 0.0)
            o_rows = (m_row // GROUP) * output_n + (head * GROUP + m_row % GROUP) * output_h
            stored = (m_row < ROWS)[:, None] & (dims < DIM)[None, :]
            tl.store(o_base + o_rows[:, None] + dims[None, :], merged.to(output.dtype.element_ty), mask=stored)
            if CHUNK > 0:
                n_row = normalizers + b * (HEADS * GROUP) + head * GROUP + m_row % GROUP
                tl.store(n_row, m_normalizer, mask=(m_row < ROWS) & (m_row // GROUP == first_new))
    else:
        if QUERIES > 1:
            result = tl.where((row // GROUP >= QUERIES - tl.load(new_lengths + b))[:, None], result, 0.0)
        o_rows = (row // GROUP) * output_n + (head * GROUP + row % GROUP) * output_h
        tl.store(o_base + o_rows[:, None] + dims[None, :], result.to(output.dtype.element_ty), mask=real)
        if CHUNK > 0:
            n_row = normalizers + b * (HEADS * GROUP) + head * GROUP + row % GROUP
            tl.store(n_row, normalizer, mask=(row < ROWS) & (row // GROUP == first_new))


@triton.jit
def _merge(
    partials,
    partial_normalizers,
    first_slot,
    num_splits,
    head,
    row,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_M: tl.constexpr,
    MERGE_S: tl.constexpr,
):
    """Attention over all stretches of a sequence from the attention over each: (output [M, D], normalizers [M])."""
    dims = tl.arange(0, BLOCK_D)
    top = tl.full([MERGE_M], float("-inf"), tl.float32)
    total = tl.zeros([MERGE_M], tl.float32)
    merged = tl.zeros([MERGE_M, BLOCK_D], tl.float32)
    for first in range(0, num_splits, MERGE_S):
        part = first + tl.arange(0, MERGE_S)
        real = (part < num_splits)[:, None] & (row < ROWS)[None, :]
        rows = (((first_slot + part) * HEADS + head) * ROWS)[:, None] + row[None, :]
        # past the first-level cache: other multiprocessors wrote these
        normalizer = tl.load(partial_normalizers + rows, mask=real, other=float("-inf"), cache_modifier=".cg")
        piece_real = real[:, :, None] if BLOCK_D == DIM else real[:, :, None] & (dims < DIM)[None, None, :]
        pieces = tl.load(
            partials + ((rows * DIM)[:, :, None] + dims[None, None, :]),
            mask=piece_real,
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(normalizer, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(normalizer - shift[None, :])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 0)
        merged = merged * decay[:, None] + tl.sum(pieces * weights[:, :, None], 0)
        top = new_top
    return merged * (1.0 / tl.where(total > 0, total, 1.0))[:, None], top + tl.log2(total)
