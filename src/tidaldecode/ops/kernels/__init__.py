"""The operations as Triton kernels, one file a kernel. Signatures and meaning are those of `tidaldecode.ops.reference`.

bfloat16, float16 and float32 (in full precision) with head dims up to 256; sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from tidaldecode.ops import MOST_CHUNK_TOKENS, reference
from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.codes import choose_by_codes, importance_by_codes
from tidaldecode.ops.kernels.importance import write_importance
from tidaldecode.ops.kernels.launch import Sets, Tiling, attend
from tidaldecode.ops.kernels.scores import Scores
from tidaldecode.ops.kernels.select import Choosing, select_tokens, tables_by_rule
from tidaldecode.ops.kernels.write import write_kv
from tidaldecode.ops.kernels.write_codes import write_codes
from tidaldecode.ops.values import KV, Choice
from tidaldecode.rules import RULES

__all__ = [
    "choose_by_codes",
    "full_attention",
    "full_attention_with_importance",
    "full_attention_with_selection",
    "importance_by_codes",
    "multi_query_attention",
    "multi_query_attention_with_selection",
    "select_tokens",
    "sparse_attention",
    "write_codes",
    "write_kv",
]

_OTHER_SHARED_BYTES = 16 * 1024  # queries, and what threads exchange


def _tiling(query: Tensor) -> Tiling:
    """How attention of [B, N, Hq, D] queries is cut: as is fastest, less where rows are long or shared memory is small.

    It must hold the K and V of all stages.
    """
    chunk = query.ndim == 4
    tokens, warps, stages, programs = (128, 4, 3, 1) if chunk else (64, 2, 3, 2)
    row_bytes = 2 * triton.next_power_of_2(query.shape[-1]) * query.element_size()
    room = scratch.shared_memory(query.device) // programs - _OTHER_SHARED_BYTES
    if chunk and query.shape[1] > 1:  # up to 64 rows of queries, half as long as K and V together
        room -= 32 * row_bytes
    while tokens > 16 and stages * tokens * row_bytes > room:
        tokens //= 2
    while stages > 1 and stages * tokens * row_bytes > room:
        stages -= 1
    return Tiling(tokens, warps, stages, programs)


def _attend_in_rounds(
    query: Tensor,
    kv: KV,
    scale: float,
    tiling: Tiling,
    scores: Scores,
    read: Callable[[int], None],
    new_lengths: Tensor | None = None,
) -> Tensor:
    """Attention of [B, N, Hq, D] queries that leaves scores; `read` is called with each round once they are there."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for turn in range(scores.rounds.number):
        attend(query, kv, scale, tiling=tiling, new_lengths=new_lengths, scores=scores, turn=turn, output=output)
        read(turn)
    return output


def full_attention(query: Tensor, kv: KV, scale: float) -> Tensor:
    """As `reference.full_attention`."""
    return attend(query[:, None], kv, scale, tiling=_tiling(query))[:, 0]


def full_attention_with_importance(
    query: Tensor, kv: KV, scale: float, selections: Sequence[str], importance: Tensor
) -> Tensor:
    """As `reference.full_attention_with_importance`."""
    rows = tables_by_rule(importance, selections, query.shape[1], kv.k.shape[2])
    tiling = _tiling(query)
    scores = Scores.room(
        query,
        kv,
        torch.zeros_like(kv.lengths),
        importance.shape[2],
        tile=tiling.tokens,
        sets=1,
        counts=0,
        more_bytes=0,
        coded=not any(RULES[rule].by_scores for rule in rows),
    )

    def write(turn: int) -> None:
        for rule, sets in rows.items():
            write_importance(scores, turn, sets, as_scores=RULES[rule].by_scores)

    return _attend_in_rounds(query[:, None], kv, scale, tiling, scores, write)[:, 0]


def full_attention_with_selection(
    query: Tensor,
    kv: KV,
    scale: float,
    selections: Sequence[str],
    choice: Choice,
    capacity: int,
    indices: Tensor,
) -> Tensor:
    """As `reference.full_attention_with_selection`; among equal importances the earlier token is chosen.

    A head's own set goes by its probabilities: the order of its scores, down to where they underflow to zero. With
    16-bit queries, scores that differ by less than 1/1024 of an octave count as equal.
    """
    tables = tables_by_rule(indices, selections, query.shape[1], kv.k.shape[2])
    tiling = _tiling(query)
    choosing = Choosing(query, kv, choice, capacity, tiling.tokens, list(tables.values()))
    return _attend_in_rounds(
        query[:, None], kv, scale, tiling, choosing.scores, lambda turn: choosing.choose(turn, kv.lengths)
    )[:, 0]


def sparse_attention(
    query: Tensor,
    kv: KV,
    indices: Tensor,
    counts: Tensor,
    head_to_set: Tensor | None,
    scale: float,
    page_size: int = 1,
) -> Tensor:
    """As `reference.sparse_attention`."""
    entries = indices.shape[1] if head_to_set is None else len(head_to_set)
    reference.check_map(entries, query.shape[1], kv.k.shape[2])
    sets = Sets(indices, counts, head_to_set, page_size)
    return attend(query[:, None], kv, scale, tiling=_tiling(query), sets=sets)[:, 0]


def multi_query_attention(query: Tensor, kv: KV, new_lengths: Tensor, scale: float) -> Tensor:
    """As `reference.multi_query_attention`; longer chunks than verification's go the way of prefill, through SDPA."""
    if query.shape[1] > MOST_CHUNK_TOKENS:
        return reference.multi_query_attention(query, kv, new_lengths, scale)
    return attend(query, kv, scale, tiling=_tiling(query), new_lengths=new_lengths)


def multi_query_attention_with_selection(
    query: Tensor,
    kv: KV,
    new_lengths: Tensor,
    scale: float,
    selection: str,
    choice: Choice,
    capacity: int,
    indices: Tensor,
) -> Tensor:
    """As `reference.multi_query_attention_with_selection`; longer chunks than verification's go through plain PyTorch.

    A head's own set goes by its probabilities, as in `full_attention_with_selection`.
    """
    if query.shape[1] > MOST_CHUNK_TOKENS:
        return reference.multi_query_attention_with_selection(
            query, kv, new_lengths, scale, selection, choice, capacity, indices
        )
    tiling = _tiling(query)
    choosing = Choosing(query, kv, choice, capacity, tiling.tokens, [indices])

    def choose(turn: int) -> None:
        choosing.choose(turn, kv.lengths - new_lengths)

    return _attend_in_rounds(query, kv, scale, tiling, choosing.scores, choose, new_lengths)
