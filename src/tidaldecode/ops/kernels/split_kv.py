"""Attention of a few new tokens per sequence over many cached ones, split over the KV length, in one launch.

Every attention operation of a decode step is this kernel: over the whole cache or over a table of index sets, for one
new token or several, with or without the scores that selection needs. A program reads one stretch of one sequence for
all query heads that share its K and V, as in Flash-Decoding (Dao et al. 2023); the last program of a sequence and head
to finish merges the stretches, so there is no second launch to wait for. How long a stretch is follows from the
lengths on the device: long sequences get more programs, and a captured CUDA graph stays right as they grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.kernels import scratch

_ROUNDS = 4
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _stretch(lengths, slot, batch, split_target, BATCH: tl.constexpr, BLOCK_T: tl.constexpr):
    """What a slot works on: (whether anything, sequence, split, splits of the sequence, their first slot, length)."""
    if BATCH == 1:  # no sums over the batch to wait for
        mine_length = tl.load(lengths)
        tiles = (mine_length + BLOCK_T - 1) // BLOCK_T
        stretch = tl.maximum((tiles + split_target - 1) // split_target, 1)  # tiles a program
        num_splits = tl.maximum((tiles + stretch - 1) // stretch, 1)
        busy, b, first = slot < num_splits, 0, 0
    else:
        index = tl.arange(0, BATCH)
        length = tl.load(lengths + index, mask=index < batch, other=0)
        tiles = (length + BLOCK_T - 1) // BLOCK_T
        stretch = tl.maximum((tl.sum(tiles) + split_target - 1) // split_target, 1)
        splits = tl.where(index < batch, tl.maximum((tiles + stretch - 1) // stretch, 1), 0)
        behind = tl.cumsum(splits, 0)
        b = tl.sum((behind <= slot).to(tl.int32))
        busy = b < batch
        b = tl.minimum(b, batch - 1)
        num_splits = tl.sum(tl.where(index == b, splits, 0))
        first = tl.sum(tl.where(index == b, behind, 0)) - num_splits
        mine_length = tl.sum(tl.where(index == b, length, 0))
    return busy, b, slot - first, num_splits, first, mine_length


@triton.jit
def _cache_rows(tokens, block_table, block_size, block_stride, row_stride, ONE_BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the cache rows of tokens, from the block on if there is only one; int64 where int32 is too small."""
    if ONE_BLOCK:
        rows = (tokens.to(tl.int64) if WIDE else tokens) * row_stride
    else:
        block = tl.load(block_table + tokens // block_size).to(tl.int64)
        rows = block * block_stride + tokens % block_size * row_stride
    return rows


@triton.jit
def _attend_kernel(
    query,  # [B, N, Hq, D]
    k_cache,
    v_cache,
    block_table,
    lengths,  # [B], tokens to read
    new_lengths,  # [B]; with QUERIES > 1
    indices,  # [B, S, K]; with SPARSE
    head_to_set,
    output,  # [B, N, Hq, D]
    scores,  # [B, Hq, T], of the first new token; with WRITE_SCORES
    normalizers,  # [B, Hq], log of the sum of exp(scores); with WRITE_SCORES
    partials,  # [slots, HEADS, rows, D], float32: attention over a stretch
    partial_normalizers,  # [slots, HEADS, rows], float32, base 2
    tickets,  # [B, HEADS, row tiles], int32, zero before and after
    scale,
    batch,
    split_target,
    block_size,
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
    scores_b,
    scores_h,
    scores_t,
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
    BATCH: tl.constexpr,
    PAGE: tl.constexpr,
    SPARSE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SAME_ROWS: tl.constexpr,  # K and V have the same strides
    WIDE: tl.constexpr,
    WRITE_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    ROWS: tl.constexpr = QUERIES * GROUP
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    head, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    slot = tl.program_id(1)
    busy, b, split, num_splits, first_slot, length = _stretch(lengths, slot, batch, split_target, BATCH, BLOCK_T)
    b64 = tl.cast(b, tl.int64)
    table = block_table + b64 * table_b
    kv_head = tl.cast(head // PER_KV_HEAD, tl.int64)
    k_base, v_base = k_cache + kv_head * k_head, v_cache + kv_head * v_head
    if ONE_BLOCK:
        block = tl.load(table).to(tl.int64)
        k_base += block * k_block
        v_base += block * v_block
    if SPARSE:
        chosen = tl.cast(0 if ONE_SET else head, tl.int64)
        if MAPPED:
            chosen = tl.load(head_to_set + chosen).to(tl.int64)
        chosen_set = indices + b64 * indices_b + chosen * indices_s
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_pointers = query + b64 * query_b + (row // GROUP) * query_n + (head * GROUP + row % GROUP) * query_h
    real = (row < ROWS)[:, None] & (dims < DIM)[None, :]
    if WRITE_SCORES:
        first_new = QUERIES - tl.load(new_lengths + b) if QUERIES > 1 else 0
    q = tl.load(q_pointers[:, None] + dims[None, :], mask=real, other=0.0)  # [M, D]
    if not busy:
        return

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
        if not ONE_BLOCK:
            token = tl.where(inside, token, 0)
        k_rows = _cache_rows(token, table, block_size, k_block, k_row, ONE_BLOCK, WIDE)
        v_rows = k_rows if SAME_ROWS else _cache_rows(token, table, block_size, v_block, v_row, ONE_BLOCK, WIDE)
        here = inside[:, None] if BLOCK_D == DIM else inside[:, None] & (dims < DIM)[None, :]
        k = tl.load(k_base + (k_rows[:, None] + dims[None, :]), mask=here, other=0.0)  # [T, D]
        v = tl.load(v_base + (v_rows[:, None] + dims[None, :]), mask=here, other=0.0)
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, T], float32
        if WRITE_SCORES:
            s_base = scores + b64 * scores_b + tl.cast(head * GROUP, tl.int64) * scores_h
            s_pointers = s_base + (row % GROUP * scores_h)[:, None] + entry[None, :]
            # also past the length, in whole vectors: a store for each score would take as long as the reads
            s_there = (row // GROUP == first_new)[:, None] & (entry < scores_t)[None, :]
            tl.store(s_pointers, dots * scale, mask=s_there, eviction_policy="evict_last")
        visible = inside[None, :]
        if QUERIES > 1:  # the newest token that each row may see
            visible = visible & (token[None, :] <= (length - QUERIES + row // GROUP)[:, None])
        logits = tl.where(visible, dots * (scale * _LOG2_E), float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if QUERIES > 1 else new_top
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
            if WRITE_SCORES:
                n_row = normalizers + b * (HEADS * GROUP) + head * GROUP + m_row % GROUP
                tl.store(n_row, m_normalizer * _LN_2, mask=m_row // GROUP == first_new)
    else:
        if QUERIES > 1:
            result = tl.where((row // GROUP >= QUERIES - tl.load(new_lengths + b))[:, None], result, 0.0)
        o_rows = (row // GROUP) * output_n + (head * GROUP + row % GROUP) * output_h
        tl.store(o_base + o_rows[:, None] + dims[None, :], result.to(output.dtype.element_ty), mask=real)
        if WRITE_SCORES:
            n_row = normalizers + b * (HEADS * GROUP) + head * GROUP + row % GROUP
            tl.store(n_row, normalizer * _LN_2, mask=row // GROUP == first_new)


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


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        tokens: tokens that a program reads at a time.
        warps: warps of a program.
        stages: depth of the software pipeline over K and V.
        programs: programs that run on a multiprocessor at once.
    """

    tokens: int
    warps: int
    stages: int
    programs: int


def attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    tiling: Tiling,
    new_lengths: Tensor | None = None,
    indices: Tensor | None = None,
    head_to_set: Tensor | None = None,
    page_size: int = 1,
    scores: Tensor | None = None,
    normalizers: Tensor | None = None,
) -> Tensor:
    """Launches the kernel.

    Args:
        query: [B, N, Hq, D].
        lengths: [B], int32; tokens to read.
        tiling: how the work is cut.
        new_lengths: [B], int32; with N > 1, how many of the N are real.
        indices, head_to_set, page_size: as for `sparse_attention`.
        scores: [B, Hq, T], float32, written: the scaled scores of each sequence's first new token.
        normalizers: [B, Hq], float32, written with `scores`: log of the sum of their exponentials.

    Returns:
        [B, N, Hq, D], dtype of `query`.
    """
    batch, queries, num_heads, dim = query.shape
    num_kv_heads = k_cache.shape[2]
    maps = 0 if indices is None else indices.shape[1] if head_to_set is None else len(head_to_set)
    heads = num_heads if maps == num_heads else num_kv_heads
    group = num_heads // heads
    rows = queries * group
    block_m = max(16, min(64, triton.next_power_of_2(rows)))
    row_tiles = triton.cdiv(rows, block_m)
    block_d = max(16, triton.next_power_of_2(dim))
    # several sequences never fill the last round of programs: many short rounds waste less of it than one
    programs = scratch.multiprocessors(query.device) * tiling.programs * (1 if batch == 1 else _ROUNDS)
    longest = k_cache.shape[1] * block_table.shape[1] if indices is None else indices.shape[2] * page_size
    split_target = max(1, min(programs // (heads * row_tiles), batch * triton.cdiv(longest, tiling.tokens)))
    slots = split_target + batch - 1
    merge_m = triton.next_power_of_2(min(rows, block_m))
    merge_s = max(1, min(triton.next_power_of_2(split_target), 8192 // (merge_m * block_d)))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    partials = torch.empty(slots * heads * rows * (dim + 1), dtype=torch.float32, device=query.device)
    overlap = scratch.overlaps(query.device)
    none = output  # stands for what a variant does not read
    index_strides = (0, 0) if indices is None else indices.stride()[:2]
    score_strides = (0, 0, 0) if scores is None else (*scores.stride()[:2], scores.shape[2])
    _attend_kernel[heads * row_tiles, slots](
        query,
        k_cache,
        v_cache,
        block_table,
        lengths,
        none if new_lengths is None else new_lengths,
        none if indices is None else indices,
        none if head_to_set is None else head_to_set,
        output,
        none if scores is None else scores,
        none if normalizers is None else normalizers,
        partials,
        partials[slots * heads * rows * dim :],
        scratch.zeros("tickets", batch * heads * row_tiles, query.device),
        scale,
        batch,
        split_target,
        k_cache.shape[1],
        *query.stride()[:3],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        *output.stride()[:3],
        *index_strides,
        *score_strides,
        QUERIES=queries,
        GROUP=group,
        HEADS=heads,
        PER_KV_HEAD=heads // num_kv_heads,
        ONE_SET=maps == 1,
        MAPPED=head_to_set is not None,
        DIM=dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_T=tiling.tokens,
        MERGE_M=merge_m,
        MERGE_S=merge_s,
        BATCH=triton.next_power_of_2(batch),
        PAGE=page_size,
        SPARSE=indices is not None,
        ONE_BLOCK=block_table.shape[1] == 1,
        SAME_ROWS=k_cache.stride()[:2] == v_cache.stride()[:2],
        WIDE=k_cache.shape[1] * max(k_cache.stride(1), v_cache.stride(1)) >= 2**31,
        WRITE_SCORES=scores is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=tiling.stages,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=tiling.warps,
    )
    return output
