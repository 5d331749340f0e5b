"""`page_scores` in Triton: one launch, the bounds of all pages read once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops import KV
from tidaldecode.ops.kernels import scratch


@triton.jit
def _page_scores_kernel(
    query,  # [B, Hq, D]
    k_cache,
    block_table,
    lengths,
    bounds,  # [num_blocks, Hkv, pages, 2, D], contiguous
    scores,  # [B, Hkv, pages], contiguous
    pages,
    query_b,
    query_h,
    k_block,
    k_row,
    k_head,
    table_b,
    HEADS: tl.constexpr,  # KV heads
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + b)
    last = (length - 1) // PAGE
    first = tl.program_id(0) * BLOCK_P
    if first > last:
        return
    row, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    there = dims < DIM
    block = tl.load(block_table + b * table_b).to(tl.int64)
    own = bounds + (block * HEADS + head) * pages * (2 * DIM)
    scores_row = scores + (b * HEADS + head) * pages
    q_real = (row < GROUP)[:, None] & there[None, :]
    q = tl.load(query + b * query_b + (head * GROUP + row)[:, None] * query_h + dims[None, :], mask=q_real, other=0.0)
    if last < first + BLOCK_P:  # the page of the newest token: its bounds from its rows
        token = last * PAGE + tl.arange(0, PAGE)
        rows = k_cache + block * k_block + head.to(tl.int64) * k_head + token.to(tl.int64)[:, None] * k_row
        real = (token < length)[:, None] & there[None, :]
        smallest = tl.min(tl.load(rows + dims[None, :], mask=real, other=float("inf")).to(tl.float32), 0)
        largest = tl.max(tl.load(rows + dims[None, :], mask=real, other=float("-inf")).to(tl.float32), 0)
        newest = own + last.to(tl.int64) * (2 * DIM) + dims
        if length % PAGE == 0:
            tl.store(newest, smallest.to(bounds.dtype.element_ty), mask=there)
            tl.store(newest + DIM, largest.to(bounds.dtype.element_ty), mask=there)
        wide, inside = q.to(tl.float32), there[None, :]  # channels beside the head hold infinities
        most = tl.maximum(wide, 0.0) * tl.where(inside, largest[None, :], 0.0)
        most += tl.minimum(wide, 0.0) * tl.where(inside, smallest[None, :], 0.0)
        tl.store(scores_row + last, tl.max(tl.where(row < GROUP, tl.sum(most, 1), float("-inf")), 0))
    page = first + tl.arange(0, BLOCK_P)
    here = (page < last)[:, None] & there[None, :]
    low = tl.load(own + page.to(tl.int64)[:, None] * (2 * DIM) + dims[None, :], mask=here, other=0.0)  # [P, D]
    high = tl.load(own + page.to(tl.int64)[:, None] * (2 * DIM) + DIM + dims[None, :], mask=here, other=0.0)
    upper = tl.dot(tl.maximum(q, 0.0).to(q.dtype), tl.trans(high), input_precision=PRECISION)  # [M, P]
    upper = tl.dot(tl.minimum(q, 0.0).to(q.dtype), tl.trans(low), upper, input_precision=PRECISION)
    score = tl.max(tl.where((row < GROUP)[:, None], upper, float("-inf")), 0)
    tl.store(scores_row + page, score, mask=page < last)


def launch(query: Tensor, kv: KV, bounds: Tensor, scores: Tensor, page_size: int) -> None:
    """As `page_scores`."""
    batch, num_heads, dim = query.shape
    _, heads, pages, _, _ = bounds.shape
    group = num_heads // heads
    block_p = 64
    overlap = scratch.overlaps(query.device)
    _page_scores_kernel[triton.cdiv(pages, block_p), heads, batch](
        query,
        kv.k,
        kv.block_table,
        kv.lengths,
        bounds,
        scores,
        pages,
        *query.stride()[:2],
        *kv.k.stride()[:3],
        kv.block_table.stride(0),
        HEADS=heads,
        GROUP=group,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        PAGE=page_size,
        BLOCK_P=block_p,
        PRECISION="ieee" if str(query.dtype) == "torch.float32" else "tf32",
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
