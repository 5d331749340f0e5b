"""How important each cached token is: scores, or probabilities averaged over query heads, for each sequence and set."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.chunks import chunks_in_round, sequence_of
from tidaldecode.ops.kernels.scores import Scores, mean_probabilities

_LN_2 = tl.constexpr(0.6931471805599453)
_PROGRAMS = 8  # on a multiprocessor


@triton.jit(do_not_specialize=["batch", "turn", "window"])
def _importance_kernel(
    values,
    tops,
    normalizers,
    lengths,  # [B]
    importance,  # [B, SETS, T], written
    batch,
    turn,
    window,
    importance_b,
    importance_s,
    BATCH: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    PAIR: tl.constexpr,
    CODED: tl.constexpr,
    AS_SCORES: tl.constexpr,  # one head a set, and its scores instead of its probabilities
):
    in_round, before, chunks, behind = chunks_in_round(lengths, batch, turn, window, BATCH, CHUNK)
    HEADS: tl.constexpr = ALL_HEADS // SETS
    for item in range(tl.program_id(0), in_round * SETS, tl.num_programs(0)):
        chunk, s = before + item // SETS, item % SETS
        b, _, first = sequence_of(chunk, chunks, behind, batch, BATCH)
        place = chunk - turn * window
        if AS_SCORES and PAIR == 0:
            entry = tl.arange(0, CHUNK)
            first_tile = (place.to(tl.int64) * (ALL_HEADS // GROUP) + s // GROUP) * (CHUNK // TILE)
            row = (first_tile + entry // TILE) * GROUP + s % GROUP
            value = tl.load(values + row * TILE + entry % TILE) * _LN_2
        else:
            value = mean_probabilities(
                values,
                tops,
                normalizers + b * ALL_HEADS,
                place,
                s * HEADS,
                ALL_HEADS,
                GROUP,
                HEADS,
                CHUNK,
                TILE,
                PAIR,
                CODED,
            )
            if AS_SCORES:  # down to where the probability underflows
                value = (tl.log2(value) + tl.load(normalizers + b * ALL_HEADS + s)) * _LN_2
        token = (chunk - first) * CHUNK + tl.arange(0, CHUNK)
        row = importance + b.to(tl.int64) * importance_b + s * importance_s
        tl.store(row + token, value, mask=token < tl.load(lengths + b))


def write_importance(scores: Scores, turn: int, importance: Tensor, as_scores: bool) -> None:
    """Writes the importances that the scores of one round stand for.

    Args:
        scores: as attention left them; not coded if they are written themselves.
        turn: the round.
        importance: [B, S, T], float32, written; S is Hq, Hkv or 1, and the sets share the query heads evenly, in order.
        as_scores: for S = Hq, the scores instead of the probabilities.
    """
    batch, sets = importance.shape[:2]
    room, kv_heads, tiles = scores.values.shape[:3]
    group, tile = scores.normalizers.shape[1] // kv_heads, scores.tile
    _importance_kernel[min(room * sets, scratch.multiprocessors(importance.device) * _PROGRAMS),](
        scores.values,
        scores.tops,
        scores.normalizers,
        scores.lengths,
        importance,
        batch,
        turn,
        scores.rounds.window,
        *importance.stride()[:2],
        BATCH=scratch.padded(batch),
        ALL_HEADS=kv_heads * group,
        GROUP=group,
        SETS=sets,
        CHUNK=tiles * tile,
        TILE=tile,
        PAIR=scores.pair,
        CODED=scores.coded,
        AS_SCORES=as_scores,
        num_warps=8,
    )
