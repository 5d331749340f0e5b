"""The operations as Triton kernels, one file a kernel. Signatures and meaning are those of `tidaldecode.ops.reference`.

bfloat16, float16 and float32 (in full precision) with head dims up to 256; sums in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from tidaldecode.ops import MOST_CHUNK_TOKENS, reference
from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.importance import write_importance
from tidaldecode.ops.kernels.scores import Scores
from tidaldecode.ops.kernels.select import Choosing, select_tokens
from tidaldecode.ops.kernels.split_kv import Tiling, attend
from tidaldecode.ops.kernels.write import write_kv
from tidaldecode.plan import Selection

__all__ = [
    "full_attention",
    "full_attention_with_importance",
    "full_attention_with_selection",
    "multi_query_attention",
    "multi_query_attention_with_selection",
    "select_tokens",
    "sparse_attention",
    "write_kv",
]

_OTHER_SHARED_BYTES = 16 * 1024  # queries, and what threads exchange


def _tiling(query: Tensor, tokens: int, warps: int, stages: int, programs: int) -> Tiling:
    """A tiling, cut down where rows are long or shared memory is small: it must hold the K and V of all stages."""
    row_bytes = 2 * triton.next_power_of_2(query.shape[-1]) * query.element_size()
    room = scratch.shared_memory(query.device) // programs - _OTHER_SHARED_BYTES
    if query.ndim == 4 and query.shape[1] > 1:  # up to 64 rows of queries, half as long as K and V together
        room -= 32 * row_bytes
    while tokens > 16 and stages * tokens * row_bytes > room:
        tokens //= 2
    while stages > 1 and stages * tokens * row_bytes > room:
        stages -= 1
    return Tiling(tokens, warps, stages, programs)


def full_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """As `reference.full_attention`."""
    tiling = _tiling(query, 64, 2, 3, 2)
    return attend(query[:, None], k_cache, v_cache, block_table, lengths, scale, tiling=tiling)[:, 0]


def full_attention_with_importance(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    selections: Sequence[Selection],
    importance: Tensor,
) -> Tensor:
    """As `reference.full_attention_with_importance`."""
    rows = _sets_by_rule(importance, selections, query.shape[1], k_cache.shape[2])
    tiling = _tiling(query, 64, 2, 3, 2)
    scores = Scores.room(
        query,
        k_cache.shape[2],
        lengths,
        torch.zeros_like(lengths),
        importance.shape[2],
        tile=tiling.tokens,
        sets=1,
        counts=0,
        more_bytes=0,
        coded="per_head" not in rows,  # whose importances are the scores
    )
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for turn in range(scores.rounds.number):
        attend(
            query[:, None],
            k_cache,
            v_cache,
            block_table,
            lengths,
            scale,
            tiling=tiling,
            scores=scores,
            turn=turn,
            output=output[:, None],
        )
        for rule, sets in rows.items():
            write_importance(scores, turn, sets, as_scores=rule == "per_head")
    return output


def full_attention_with_selection(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    selections: Sequence[Selection],
    budgets: Tensor,
    recents: Tensor,
    sink_tokens: int,
    capacity: int,
    indices: Tensor,
) -> Tensor:
    """As `reference.full_attention_with_selection`; among equal importances the earlier token is chosen.

    A head's own set goes by its probabilities: the order of its scores, down to where they underflow to zero. With
    16-bit queries, scores that differ by less than 1/1024 of an octave count as equal.
    """
    tables = _sets_by_rule(indices, selections, query.shape[1], k_cache.shape[2])
    tiling = _tiling(query, 64, 2, 3, 2)
    choosing = Choosing(query, k_cache.shape[2], lengths, budgets, capacity, tiling.tokens, list(tables.values()))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for turn in range(choosing.scores.rounds.number):
        attend(
            query[:, None],
            k_cache,
            v_cache,
            block_table,
            lengths,
            scale,
            tiling=tiling,
            scores=choosing.scores,
            turn=turn,
            output=output[:, None],
        )
        choosing.choose(turn, lengths, budgets, recents, sink_tokens)
    return output


def _sets_by_rule(
    rows: Tensor, selections: Sequence[Selection], num_heads: int, num_kv_heads: int
) -> dict[Selection, Tensor]:
    """The rows of each rule among those of several, [B, S, ...]: views."""
    sizes = [{"per_head": num_heads, "per_group": num_kv_heads, "unified": 1}[rule] for rule in selections]
    return dict(zip(selections, rows.split(sizes, 1), strict=True))


def sparse_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    indices: Tensor,
    counts: Tensor,
    head_to_set: Tensor | None,
    scale: float,
    page_size: int = 1,
) -> Tensor:
    """As `reference.sparse_attention`."""
    entries = indices.shape[1] if head_to_set is None else len(head_to_set)
    reference.check_map(entries, query.shape[1], k_cache.shape[2])
    tiling = _tiling(query, 64, 2, 3, 2)
    return attend(
        query[:, None],
        k_cache,
        v_cache,
        block_table,
        counts,
        scale,
        tiling=tiling,
        indices=indices,
        head_to_set=head_to_set,
        page_size=page_size,
    )[:, 0]


def multi_query_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    new_lengths: Tensor,
    scale: float,
) -> Tensor:
    """As `reference.multi_query_attention`; longer chunks than verification's go the way of prefill, through SDPA."""
    if query.shape[1] > MOST_CHUNK_TOKENS:
        return reference.multi_query_attention(query, k_cache, v_cache, block_table, lengths, new_lengths, scale)
    tiling = _tiling(query, 128, 4, 3, 1)
    return attend(query, k_cache, v_cache, block_table, lengths, scale, tiling=tiling, new_lengths=new_lengths)


def multi_query_attention_with_selection(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    new_lengths: Tensor,
    scale: float,
    selection: Selection,
    budgets: Tensor,
    recents: Tensor,
    sink_tokens: int,
    capacity: int,
    indices: Tensor,
) -> Tensor:
    """As `reference.multi_query_attention_with_selection`; longer chunks than verification's go through plain PyTorch.

    A head's own set goes by its probabilities, as in `full_attention_with_selection`.
    """
    chunk = query, k_cache, v_cache, block_table, lengths, new_lengths, scale
    choice = budgets, recents, sink_tokens
    if query.shape[1] > MOST_CHUNK_TOKENS:
        return reference.multi_query_attention_with_selection(*chunk, selection, *choice, capacity, indices)
    tiling = _tiling(query, 128, 4, 3, 1)
    choosing = Choosing(query, k_cache.shape[2], lengths, budgets, capacity, tiling.tokens, [indices])
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for turn in range(choosing.scores.rounds.number):
        attend(
            query,
            k_cache,
            v_cache,
            block_table,
            lengths,
            scale,
            tiling=tiling,
            new_lengths=new_lengths,
            scores=choosing.scores,
            turn=turn,
            output=output,
        )
        choosing.choose(turn, lengths - new_lengths, *choice)
    return output
