"""Merges attention over the stretches of a sequence in a launch of its own.

The last program of a head does that inside `attend_kernel` where one look at the stretches is enough. With few KV heads
there are too many for it: 66 of them for each of two KV heads took it nine rounds, one after another.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "split_target"])
def merge_kernel(
    partials,  # as of `attend_kernel`, for one new token
    partial_normalizers,
    lengths,  # [B]
    output,  # [B, Hq, D], written where there are several stretches
    normalizers,  # [B, Hq]; written with SCORED
    batch,
    split_target,
    output_b,
    output_h,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BATCH: tl.constexpr,
    SCORED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, b = tl.program_id(0), tl.program_id(2)
    index = tl.arange(0, BATCH)
    tiles = (tl.load(lengths + index, mask=index < batch, other=0) + BLOCK_T - 1) // BLOCK_T
    stretch = tl.maximum((tl.sum(tiles) + split_target - 1) // split_target, 1)
    splits = tl.where(index < batch, tl.maximum((tiles + stretch - 1) // stretch, 1), 0)
    num_splits = tl.sum(tl.where(index == b, splits, 0))
    first_slot = tl.sum(tl.where(index < b, splits, 0))
    if num_splits == 1:
        return
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    merged = tl.zeros([BLOCK_D], tl.float32)
    top, total = -float("inf"), 0.0
    for first in range(0, num_splits, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        there = part < num_splits
        rows = ((first_slot + part) * HEADS + row // GROUP) * GROUP + row % GROUP
        normalizer = tl.load(partial_normalizers + rows, mask=there, other=float("-inf"))
        inside = there[:, None] & (dims < DIM)[None, :]
        pieces = tl.load(partials + ((rows * DIM)[:, None] + dims[None, :]), mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(normalizer, 0))
        weights = tl.exp2(normalizer - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 0)
        merged = merged * decay + tl.sum(pieces * weights[:, None], 0)
        top = new_top
    place = output + b.to(tl.int64) * output_b + row * output_h + dims
    tl.store(place, (merged / total).to(output.dtype.element_ty), mask=dims < DIM)
    if SCORED:  # noqa: SIM102 - known when it is compiled
        if tl.program_id(1) == 0:
            tl.store(normalizers + b * (HEADS * GROUP) + row, top + tl.log2(total))
