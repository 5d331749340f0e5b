"""Selection: from importances, or from the scores themselves, to a set of indices, without a sort.

Three short launches. The first counts the importances of each chunk of tokens by coarse bins (the float's exponent and
its first mantissa bits); given scores it makes importances of them on the way. The second knows from the counts in
which bin the budget ends: it writes the tokens above that bin, and lists those in it as candidates. The third finds
the exact threshold among the candidates, by bisection; where codes of keys are scored, the last program of a set does
that at the end of the second launch. Where a chunk's tokens go follows from the counts of the chunks
before it, so that the same importances always give the same table. Programs take the chunks that there are, one after
another. A short row of importances needs one launch: a program holds all of it, and bisects at once.

No launch leaves anything for the next choice: what a failed or interrupted one has written is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.bins import count_kernel, finish_kernel, write_above_kernel
from tidaldecode.ops.kernels.largest import ordered, threshold_of, write_forced, write_largest
from tidaldecode.ops.kernels.scores import Scores
from tidaldecode.ops.rounds import Rounds, list_bytes, rounds_for
from tidaldecode.ops.values import KV, Choice, check_float32, check_rows
from tidaldecode.rules import RULES

_IMPORTANCE_BINS, _SCORE_BINS = 256, 64  # counters of an index set; counting costs as much as there are bins
_HELD = 8192  # importances that one program can hold
_PROGRAMS = 8  # on a multiprocessor
_FINISHES = True  # the second launch, where codes of keys are scored
_FINISHING_REGISTERS = 80  # of a thread, or fewer programs run side by side; what is spilled is the last program's
_FEW_HEADS = 4  # importances of more heads are kept, of fewer computed anew: as many bytes, or fewer


@triton.jit
def _choose_held_kernel(
    importance,  # [B, S, T]
    lengths,
    budgets,
    recents,
    sink,
    indices,  # [B, S, K]
    capacity,
    importance_b,
    importance_s,
    indices_b,
    indices_s,
    HELD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length, budget, recent = tl.load(lengths + b), tl.load(budgets + b), tl.load(recents + b)
    token = tl.arange(0, HELD)
    value = tl.load(importance + b * importance_b + s * importance_s + token, mask=token < capacity, other=0.0)
    chosen_set = indices + b * indices_b + s * indices_s
    if length <= budget:  # chosen whole
        tl.store(chosen_set + token, token, mask=token < length)
    else:
        key, free = ordered(value), (token >= sink) & (token < length - recent)
        wanted = budget - sink - recent
        write_largest(key, token, free, threshold_of(key, free, wanted), wanted, chosen_set + sink)
        write_forced(chosen_set, length, budget, recent, sink, 256)


def select_tokens(importance: Tensor, lengths: Tensor, choice: Choice, indices: Tensor) -> None:
    """As `reference.select_tokens`, for float32 importances; among equal importances the earlier token is chosen."""
    check_float32(importance=importance)
    check_rows(importance=importance, lengths=lengths, indices=indices)
    batch, sets, capacity = importance.shape
    if capacity <= _HELD:
        held = max(128, triton.next_power_of_2(capacity))
        _choose_held_kernel[sets, batch](
            importance,
            lengths,
            choice.budgets,
            choice.recents,
            choice.sinks,
            indices,
            capacity,
            *importance.stride()[:2],
            *indices.stride()[:2],
            HELD=held,
            OVERLAP=scratch.overlaps(indices.device),
            launch_pdl=scratch.overlaps(indices.device),
            num_warps=max(1, min(8, held // 1024)),
        )
        return
    rounds = rounds_for(batch, capacity, sets, list_bytes(sets))
    lists = _Lists.room(indices, rounds, _IMPORTANCE_BINS, kept=None)
    totals = torch.zeros(batch, sets * _IMPORTANCE_BINS, dtype=torch.int32, device=indices.device)
    for turn in range(rounds.number):
        _count_and_choose(importance, rounds, turn, lengths, choice, totals, lists, indices)


@dataclass(frozen=True)
class _Lists:
    """What the launches of a round leave for each other, by chunks.

    Attributes:
        importance: [chunks, S, C]; what scores of more than a few heads became, float32; of codes of keys short keys,
            uint16, which compare importances by their exponent and 8 bits alone.
        reaching: [chunks, S, BINS], int32.
        candidate_keys, candidate_tokens: [chunks · S · C], int32.
    """

    importance: Tensor
    reaching: Tensor
    candidate_keys: Tensor
    candidate_tokens: Tensor

    @classmethod
    def room(cls, indices: Tensor, rounds: Rounds, bins: int, kept: torch.dtype | None) -> _Lists:
        sets = indices.shape[1]
        candidates = indices.new_empty(2, rounds.chunks * sets * rounds.tokens)
        return cls(
            indices.new_empty(rounds.chunks if kept else 0, sets, rounds.tokens, dtype=kept or torch.float32),
            indices.new_empty(rounds.chunks, sets, bins),
            *candidates,
        )


class Choosing:
    """Selection from scores: makes its room before attention writes the scores, so that nothing is half done.

    Args:
        query: [B, ..., Hq, D].
        kv: the cache.
        choice: how many tokens, and which of them in any case.
        capacity: the longest that a sequence can become.
        tile: tokens that attention reads at once.
        tables: for each rule, the index sets that it writes, [B, S, K], int32; S is 1, Hkv or Hq.
        pair: as for `Scores`.

    Attributes:
        scores: room for the scores; attention fills it for one round, then `choose` reads it.
    """

    def __init__(
        self,
        query: Tensor,
        kv: KV,
        choice: Choice,
        capacity: int,
        tile: int,
        tables: list[Tensor],
        pair: int = 0,
    ) -> None:
        sets = [table.shape[1] for table in tables]
        heads = query.shape[-2]
        self._choice, self._tables = choice, tables
        self.scores = Scores.room(
            query,
            kv,
            choice.budgets,
            capacity,
            tile=tile,
            sets=max(sets),
            counts=sum(sets) * _SCORE_BINS,
            more_bytes=list_bytes(sum(sets)),
            coded=True,
            pair=pair,
        )
        for table in tables:
            check_rows(indices=table)
        rounds = self.scores.rounds
        self._lists = []
        for table in tables:
            many = torch.float32 if heads // table.shape[1] > _FEW_HEADS else None
            self._lists.append(_Lists.room(table, rounds, _SCORE_BINS, torch.uint16 if pair else many))

    def choose(self, turn: int, lengths: Tensor) -> None:
        """Writes the index sets of one round.

        Args:
            turn: the round.
            lengths: [B], int32; tokens to choose from, no more than the cache's.
        """
        start = 0
        for table, lists in zip(self._tables, self._lists, strict=True):
            counts = self.scores.counts[:, start : start + table.shape[1] * _SCORE_BINS]
            start += counts.shape[1]
            _count_and_choose(self.scores, self.scores.rounds, turn, lengths, self._choice, counts, lists, table)


def _count_and_choose(
    source: Scores | Tensor,
    rounds: Rounds,
    turn: int,
    lengths: Tensor,
    choice: Choice,
    totals: Tensor,
    lists: _Lists,
    indices: Tensor,
) -> None:
    """The launches of one round, from scores or from importances [B, S, T]."""
    batch, sets = indices.shape[:2]
    overlap = scratch.overlaps(indices.device)
    if isinstance(source, Scores):
        values, cached, strides = (source.values, source.tops, source.normalizers), source.lengths, (0, 0)
        tile, pair, coded, all_heads = source.tile, source.pair, source.coded, source.normalizers.shape[1]
        heads, group = all_heads // sets, all_heads // source.values.shape[1]
    else:
        values, cached, strides = (source,) * 3, lengths, (source.stride(0), source.stride(1))
        heads, group, tile, pair, coded = 0, 1, rounds.tokens, 0, False
    which = cached, lengths, choice.budgets, choice.recents, choice.sinks
    bins = lists.reaching.shape[2]
    shared = {
        "BINS": bins,
        "BATCH": scratch.padded(batch),
        "CHUNK": rounds.tokens,
        "OVERLAP": overlap,
        "launch_pdl": overlap,
    }
    read = {
        "SETS": sets,
        "HEADS": heads,
        "GROUP": group,
        "TILE": tile,
        "PAIR": pair,
        "CODED": coded,
        "KEPT": lists.importance.numel() > 0,
        "SHORT": lists.importance.dtype == torch.uint16,
    }
    programs = min(rounds.chunks * sets, scratch.multiprocessors(indices.device) * _PROGRAMS)
    turn_and_strides = batch, turn, rounds.window, *strides, totals.stride(0)
    candidates = lists.candidate_keys, lists.candidate_tokens
    finish = pair > 0 and _FINISHES
    warps = 4 if rounds.tokens < 2048 and heads <= 1 else 8
    count_kernel[programs,](
        *values, *which, lists.importance, lists.reaching, totals, *turn_and_strides, **read, **shared, num_warps=warps
    )
    write_above_kernel[programs,](
        *values,
        *which,
        lists.importance,
        lists.reaching,
        totals,
        *candidates,
        indices,
        scratch.zeros("choosing tickets", batch * sets, indices.device),
        *turn_and_strides,
        *indices.stride()[:2],
        **read,
        **shared,
        FINISH=finish,
        num_warps=warps,
        maxnreg=_FINISHING_REGISTERS if finish else None,
    )
    if finish:
        return
    finish_kernel[sets, batch](
        *which,
        totals,
        *candidates,
        indices,
        batch,
        turn,
        rounds.window,
        totals.stride(0),
        *indices.stride()[:2],
        **shared,
        num_warps=4,
    )


def tables_by_rule(rows: Tensor, selections: Sequence[str], num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
    """The rows of each rule among those of several, [B, S, ...]: views."""
    sizes = [RULES[rule].num_sets(num_heads, num_kv_heads) for rule in selections]
    return dict(zip(selections, rows.split(sizes, 1), strict=True))
