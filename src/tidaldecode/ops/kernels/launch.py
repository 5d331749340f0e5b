"""Launches attention of a few new tokens per sequence over many cached ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.merge import merge_kernel
from tidaldecode.ops.kernels.scores import Scores
from tidaldecode.ops.kernels.split_kv import attend_kernel
from tidaldecode.ops.values import KV, check_rows

_ROUNDS = 4
_MERGED_AT_ONCE = 8192  # numbers that the last program of a head looks at together
_MERGED_CHANNELS, _MERGED_STRETCHES = 32, 256  # of a program that merges
_WIDE = 2**31  # elements of a block from which on an offset within it takes 64 bits


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


@dataclass(frozen=True)
class Sets:
    """The tokens, or pages of them, that sparse attention reads; attributes as the arguments of `sparse_attention`."""

    indices: Tensor
    counts: Tensor
    head_to_set: Tensor | None
    page_size: int

    def __post_init__(self) -> None:
        check_rows(indices=self.indices, counts=self.counts.t(), head_to_set=self.head_to_set)


def attend(
    query: Tensor,
    kv: KV,
    scale: float,
    *,
    tiling: Tiling,
    new_lengths: Tensor | None = None,
    sets: Sets | None = None,
    scores: Scores | None = None,
    turn: int = 0,
    output: Tensor | None = None,
) -> Tensor:
    """Launches the kernel.

    Args:
        query: [B, N, Hq, D].
        kv: the cache; all of it is read if there are no `sets`.
        scale: factor of the scores.
        tiling: how the work is cut.
        new_lengths: [B], int32; with N > 1, how many of the N are real.
        sets: what sparse attention reads.
        scores: written, of the sequences of one round: those of each one's first new token.
        turn: the round; without `scores` there is one.
        output: [B, N, Hq, D], contiguous; written for the sequences of the round, instead of a new one.

    Returns:
        [B, N, Hq, D], dtype of `query`.
    """
    check_rows(query=query, new_lengths=new_lengths)
    lengths, indices, head_to_set, page_size = kv.lengths, None, None, 1
    if sets is not None:
        lengths, indices, head_to_set, page_size = sets.counts, sets.indices, sets.head_to_set, sets.page_size
    batch, queries, num_heads, dim = query.shape
    _, block_size, num_kv_heads, _ = kv.k.shape
    maps = 0 if indices is None else indices.shape[1] if head_to_set is None else len(head_to_set)
    heads = num_heads if maps == num_heads else num_kv_heads
    group = num_heads // heads
    rows = queries * group
    block_m = max(16, min(64, triton.next_power_of_2(rows)))
    row_tiles = triton.cdiv(rows, block_m)
    block_d = max(16, triton.next_power_of_2(dim))
    # several sequences never fill the last round of programs: many short rounds waste less of it than one
    programs = scratch.multiprocessors(query.device) * tiling.programs * (1 if batch == 1 else _ROUNDS)
    longest = block_size * kv.block_table.shape[1] if indices is None else indices.shape[2] * page_size
    split_target = max(1, min(programs // (heads * row_tiles), batch * triton.cdiv(longest, tiling.tokens)))
    slots = split_target + batch - 1
    merge_m = triton.next_power_of_2(min(rows, block_m))
    merge_s = max(1, min(triton.next_power_of_2(split_target), _MERGED_AT_ONCE // (merge_m * block_d)))
    # those of a chunk, of sets of several sizes and of rounds are merged in place
    apart = split_target > merge_s * batch and queries == 1 and lengths.dim() == 1 and (scores is None or batch == 1)
    if output is None:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
    partials = torch.empty(slots * heads * rows * (dim + 1), dtype=torch.float32, device=query.device)
    overlap = scratch.overlaps(query.device)
    none = output  # stands for what a variant does not read
    set_strides: tuple[int, ...] = (0, 0, 0)
    if sets is not None:
        set_strides = (*sets.indices.stride()[:2], sets.counts.stride(1) if sets.counts.dim() == 2 else 0)
    if scores is None:
        score_tensors, window, budgets = (none,) * 4, 1, none
    else:
        score_tensors, window = (scores.values, scores.tops, scores.normalizers, scores.counts), scores.rounds.window
        budgets = scores.budgets
    attend_kernel[heads * row_tiles, slots](
        query,
        kv.k,
        kv.v,
        kv.block_table,
        lengths,
        none if new_lengths is None else new_lengths,
        none if indices is None else indices,
        none if head_to_set is None else head_to_set,
        output,
        *score_tensors,
        budgets,
        turn,
        window,
        partials,
        partials[slots * heads * rows * dim :],
        scratch.zeros("tickets", batch * heads * row_tiles, query.device),
        scale,
        batch,
        split_target,
        *query.stride()[:3],
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        kv.block_table.stride(0),
        *output.stride()[:3],
        *set_strides,
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
        APART=apart,
        BATCH=scratch.padded(batch),
        PAGE=page_size,
        SPARSE=indices is not None,
        BLOCK=0 if kv.block_table.shape[1] == 1 else block_size,
        SAME_ROWS=kv.k.stride()[:2] == kv.v.stride()[:2],
        WIDE=block_size * max(kv.k.stride(1), kv.v.stride(1)) >= _WIDE,
        CHUNK=0 if scores is None else scores.rounds.tokens,
        CODED=scores is not None and scores.coded,
        COUNTS=0 if scores is None else scores.counts.shape[1],
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=tiling.stages,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=tiling.warps,
    )
    if apart:
        slice_d = min(block_d, _MERGED_CHANNELS)
        merge_kernel[num_heads, triton.cdiv(dim, slice_d), batch](
            partials,
            partials[slots * heads * rows * dim :],
            lengths,
            output,
            score_tensors[2],
            batch,
            split_target,
            output.stride(0),
            output.stride(2),
            GROUP=group,
            HEADS=heads,
            DIM=dim,
            BLOCK_D=slice_d,
            BLOCK_S=min(triton.next_power_of_2(split_target), _MERGED_STRETCHES),
            BLOCK_T=tiling.tokens,
            BATCH=scratch.padded(batch),
            SCORED=scores is not None,
            OVERLAP=overlap,
            launch_pdl=overlap,
        )
    return output
