"""How important each cached token is: from scores to probabilities, averaged over query heads.

The softmax normalizer is known only when attention is done, so this is a second pass, over scores and not over K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_TOKENS = 256


@triton.jit
def _importance_kernel(
    scores,  # [B, Hq, T]
    normalizers,  # [B, Hq]
    lengths,  # [B]
    groups,  # [B, Hkv, T]; with PER_GROUP
    unified,  # [B, 1, T]; with UNIFIED
    scores_b,
    scores_h,
    groups_b,
    groups_h,
    unified_b,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PER_GROUP: tl.constexpr,
    UNIFIED: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b)
    start = tl.program_id(0) * BLOCK_T
    if start >= length:
        return
    token = start + tl.arange(0, BLOCK_T)
    inside = token < length
    over_all = tl.zeros([BLOCK_T], tl.float32)
    for kv_head in tl.static_range(KV_HEADS):
        over_group = tl.zeros([BLOCK_T], tl.float32)
        for g in tl.static_range(GROUP):
            head = kv_head * GROUP + g
            score = tl.load(scores + b * scores_b + head * scores_h + token, mask=inside, other=float("-inf"))
            over_group += tl.exp2((score - tl.load(normalizers + b * (KV_HEADS * GROUP) + head)) * _LOG2_E)
        if PER_GROUP:
            tl.store(groups + b * groups_b + kv_head * groups_h + token, over_group / GROUP, mask=inside)
        over_all += over_group
    if UNIFIED:
        tl.store(unified + b * unified_b + token, over_all / (KV_HEADS * GROUP), mask=inside)


def average_probabilities(
    scores: Tensor,
    normalizers: Tensor,
    lengths: Tensor,
    num_kv_heads: int,
    per_group: Tensor | None,
    unified: Tensor | None,
) -> None:
    """Writes the mean probability of each token over the query heads of a KV head, and over all query heads.

    Args:
        scores: [B, Hq, T], float32; entries past a sequence's length are not read.
        normalizers: [B, Hq], float32; log of the sum of the exponentials of a head's scores.
        lengths: [B], int32.
        num_kv_heads: Hkv.
        per_group: [B, Hkv, T], float32, written; `None` if not wanted.
        unified: [B, 1, T], float32, written; `None` if not wanted.
    """
    batch, num_heads, capacity = scores.shape
    _importance_kernel[triton.cdiv(capacity, _TOKENS), batch](
        scores,
        normalizers,
        lengths,
        scores if per_group is None else per_group,
        scores if unified is None else unified,
        *scores.stride()[:2],
        *((0, 0) if per_group is None else per_group.stride()[:2]),
        0 if unified is None else unified.stride(0),
        KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        BLOCK_T=_TOKENS,
        PER_GROUP=per_group is not None,
        UNIFIED=unified is not None,
        num_warps=2,
    )
