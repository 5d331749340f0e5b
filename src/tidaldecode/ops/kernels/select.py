"""Selection: from importances, or from the scores themselves, to a set of indices, without a sort.

Three short launches. The first counts the importances of each chunk of tokens by coarse bins (the float's exponent and
its first mantissa bits); given scores it makes importances of them on the way. The second knows from the counts in
which bin the budget ends: it writes the tokens above that bin, and lists those in it as candidates. The third finds
the exact threshold among the candidates, by bisection. Where a chunk's tokens go follows from the counts of the chunks
before it, so that the same importances always give the same table. Programs take the chunks that there are, one after
another. A short row of importances needs one launch: a program holds all of it, and bisects at once.

No launch leaves anything for the next choice: what a failed or interrupted one has written is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.kernels import scratch
from tidaldecode.ops.kernels.chunks import Rounds, chunks_in_round, rounds_for, sequence_of
from tidaldecode.ops.kernels.scores import Scores, mean_probabilities
from tidaldecode.ops.values import KV, Choice, check_float32, check_rows

_IMPORTANCE_BINS, _SCORE_BINS = 256, 64  # counters of an index set; counting costs as much as there are bins
_HELD = 8192  # importances that one program can hold
_FEW, _MANY = tl.constexpr(1024), tl.constexpr(8192)  # candidates that a program holds, usually and at most
_BEFORE = tl.constexpr(128)  # earlier chunks whose counts are added up at once
_FEW_HEADS = tl.constexpr(4)  # importances of more heads are kept, of fewer computed anew: as many bytes, or fewer
_PROGRAMS = 8  # on a multiprocessor
_LEAST, _MOST = tl.constexpr(-0x80000000), tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(importance):
    """Integers in the order of the floats; any NaN is the largest, as for `torch.topk`."""
    bits = tl.where(importance == importance, importance.to(tl.int32, bitcast=True), 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _bin(key, wanted, PROBABILITIES: tl.constexpr):
    """A coarse bin, four an octave, that never falls as the key rises, and below the last.

    `wanted` probabilities that add up to one at most can't all exceed `1 / wanted`, so they end below it: the bins of
    probabilities cover 15 octaves from there down. Those of importances go from 2^-32 to 2^8 for positive numbers, from
    -2^8 to -2^-8 for negative ones. What lies outside shares the outermost bins: slower, but right.
    """
    if PROBABILITIES:
        most = (1.0 / wanted.to(tl.float32)).to(tl.int32, bitcast=True) >> 21
        return tl.minimum(tl.maximum((key >> 21) - most + 62, 0), 62)
    positive = tl.minimum(tl.maximum((key >> 21) - 380, 0), 159) + 64
    negative = 63 - tl.minimum(tl.maximum((~key >> 21) - 476, 0), 63)
    return tl.where(key >= 0, positive, negative)


@triton.jit
def _threshold(key, real, wanted):
    """A key such that at least `wanted` keys reach it and fewer exceed it, by bisection."""
    low = tl.min(tl.where(real, key, _MOST))
    high = tl.max(tl.where(real, key, _LEAST))
    while low < high:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the mean rounded up, without overflow
        reached = tl.sum((real & (key >= middle)).to(tl.int32))
        if reached >= wanted:
            low = middle
        else:
            high = middle - 1
        if reached == wanted:
            high = middle
    return low


@triton.jit
def _write_largest(key, token, real, threshold, wanted, chosen):
    """Writes the tokens whose keys exceed the threshold, and of those that equal it the first, `wanted` in all."""
    above, equal = real & (key > threshold), real & (key == threshold)
    ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # both counts in one scan
    num_above = tl.sum(above.to(tl.int32))
    tl.store(chosen + (ranks & 0xFFFF) - 1, token, mask=above)
    place = num_above + (ranks >> 16) - 1
    tl.store(chosen + place, token, mask=equal & (place < wanted))


@triton.jit
def _write_forced(chosen_set, length, budget, recent, sink, BLOCK: tl.constexpr):
    """Sinks at the front of a set, recent tokens at its end."""
    for start in range(0, sink, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        tl.store(chosen_set + entry, entry, mask=entry < sink)
    for start in range(0, recent, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        tl.store(chosen_set + budget - recent + entry, length - recent + entry, mask=entry < recent)


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
        key, free = _ordered(value), (token >= sink) & (token < length - recent)
        wanted = budget - sink - recent
        _write_largest(key, token, free, _threshold(key, free, wanted), wanted, chosen_set + sink)
        _write_forced(chosen_set, length, budget, recent, sink, 256)


@triton.jit(do_not_specialize=["batch", "turn", "window"])
def _count_kernel(
    values,  # [B, S, T] importances; with HEADS > 0 scores, see `Scores`
    tops,
    normalizers,
    cached,  # [B]; tokens of the sequences, by which they are cut into chunks
    lengths,  # [B]; those to choose from
    budgets,
    recents,
    sink,
    importance,  # [chunks, S, CHUNK], written with more than a few HEADS
    reaching,  # [chunks, S, BINS], written: importances of a chunk in each bin or above it
    totals,  # [B, S, BINS], added up over the chunks; zero before
    batch,
    turn,
    window,
    values_b,
    values_s,
    totals_b,
    BATCH: tl.constexpr,
    SETS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CODED: tl.constexpr,
    BINS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    in_round, before, chunks, behind = chunks_in_round(cached, batch, turn, window, BATCH, CHUNK)
    for item in range(tl.program_id(0), in_round * SETS, tl.num_programs(0)):
        chunk, s = before + item // SETS, item % SETS
        b, _, first = sequence_of(chunk, chunks, behind, batch, BATCH)
        length, budget, recent = tl.load(lengths + b), tl.load(budgets + b), tl.load(recents + b)
        start = (chunk - first) * CHUNK
        if (length > budget) & (start < length - recent):
            place = chunk - turn * window
            row = place.to(tl.int64) * SETS + s
            token = start + tl.arange(0, CHUNK)
            if HEADS == 0:
                pointers = values + b.to(tl.int64) * values_b + s * values_s + token
                value = tl.load(pointers, mask=token < length, other=0.0)
            else:
                value = mean_probabilities(
                    values,
                    tops,
                    normalizers + b * (SETS * HEADS),
                    place,
                    s * HEADS,
                    SETS * HEADS,
                    GROUP,
                    HEADS,
                    CHUNK,
                    TILE,
                    CODED,
                )
            if HEADS > _FEW_HEADS:
                tl.store(importance + row * CHUNK + tl.arange(0, CHUNK), value)
            free = (token >= sink) & (token < length - recent)
            its_bin = _bin(_ordered(value), budget - sink - recent, HEADS > 0)
            counts = tl.histogram(its_bin, BINS, mask=free)
            bins = tl.arange(0, BINS)
            tl.store(reaching + row * BINS + bins, tl.cumsum(counts, 0, reverse=True))
            total = totals + b.to(tl.int64) * totals_b + s * BINS + bins
            tl.atomic_add(total, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _border(totals, wanted, BINS: tl.constexpr):
    """The bin in which the budget ends, how many importances lie above it, and how many in it."""
    bins = tl.arange(0, BINS)
    reach = tl.cumsum(tl.load(totals + bins), 0, reverse=True)
    border = tl.sum((reach >= wanted).to(tl.int32)) - 1
    num_above = tl.sum(tl.where(bins == border + 1, reach, 0))
    return border, num_above, tl.sum(tl.where(bins == border, reach, 0)) - num_above


@triton.jit(do_not_specialize=["batch", "turn", "window"])
def _write_above_kernel(
    values,
    tops,
    normalizers,
    cached,
    lengths,
    budgets,
    recents,
    sink,
    importance,
    reaching,
    totals,
    candidate_keys,  # for each sequence and set its chunks, one after another; written
    candidate_tokens,
    indices,  # [B, S, K], written
    batch,
    turn,
    window,
    values_b,
    values_s,
    totals_b,
    indices_b,
    indices_s,
    BATCH: tl.constexpr,
    SETS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CODED: tl.constexpr,
    BINS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    in_round, before, chunks, behind = chunks_in_round(cached, batch, turn, window, BATCH, CHUNK)
    for item in range(tl.program_id(0), in_round * SETS, tl.num_programs(0)):
        chunk, s = before + item // SETS, item % SETS
        b, own, first = sequence_of(chunk, chunks, behind, batch, BATCH)
        length, budget, recent = tl.load(lengths + b), tl.load(budgets + b), tl.load(recents + b)
        b64, start, place = b.to(tl.int64), (chunk - first) * CHUNK, chunk - turn * window
        token = start + tl.arange(0, CHUNK)
        chosen_set = indices + b64 * indices_b + s * indices_s
        if length <= budget:  # chosen whole
            tl.store(chosen_set + token, token, mask=token < length)
        elif start < length - recent:
            row = place.to(tl.int64) * SETS + s
            if HEADS == 0:
                value = tl.load(values + b64 * values_b + s * values_s + token, mask=token < length, other=0.0)
            elif HEADS > _FEW_HEADS:
                value = tl.load(importance + row * CHUNK + tl.arange(0, CHUNK))
            else:
                value = mean_probabilities(
                    values,
                    tops,
                    normalizers + b * (SETS * HEADS),
                    place,
                    s * HEADS,
                    SETS * HEADS,
                    GROUP,
                    HEADS,
                    CHUNK,
                    TILE,
                    CODED,
                )
            wanted = budget - sink - recent
            border, _, _ = _border(totals + b64 * totals_b + s * BINS, wanted, BINS)
            above_before, reached_before = 0, 0
            first_row = row - (chunk - first) * SETS
            for start_before in range(0, chunk - first, _BEFORE):
                earlier = start_before + tl.arange(0, _BEFORE)
                counts = reaching + (first_row + earlier * SETS) * BINS + border
                there = earlier < chunk - first
                above_before += tl.sum(tl.load(counts + 1, mask=there, other=0))
                reached_before += tl.sum(tl.load(counts, mask=there, other=0))

            free = (token >= sink) & (token < length - recent)
            key = _ordered(value)
            its_bin = _bin(key, wanted, HEADS > 0)
            above, inside = free & (its_bin > border), free & (its_bin == border)
            ranks = tl.cumsum(above.to(tl.int32) + (inside.to(tl.int32) << 16), 0)  # both counts in one scan
            tl.store(chosen_set + sink + above_before + (ranks & 0xFFFF) - 1, token, mask=above)
            room = (first - turn * window).to(tl.int64) * SETS + s * own
            entry = room * CHUNK + reached_before - above_before + (ranks >> 16) - 1
            tl.store(candidate_keys + entry, key, mask=inside)
            tl.store(candidate_tokens + entry, token, mask=inside)


@triton.jit(do_not_specialize=["batch", "turn", "window"])
def _finish_kernel(
    cached,
    lengths,
    budgets,
    recents,
    sink,
    totals,
    candidate_keys,
    candidate_tokens,
    indices,
    batch,
    turn,
    window,
    totals_b,
    indices_b,
    indices_s,
    BATCH: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, budget, recent = tl.load(lengths + b), tl.load(budgets + b), tl.load(recents + b)
    _, _, chunks, behind = chunks_in_round(cached, batch, turn, window, BATCH, CHUNK)
    index = tl.arange(0, BATCH)
    own = tl.sum(tl.where(index == b, chunks, 0))
    first = tl.sum(tl.where(index == b, behind, 0)) - own
    if (length <= budget) | (first // window != turn):
        return
    b64, wanted = b.to(tl.int64), budget - sink - recent
    _, num_above, num_candidates = _border(totals + b64 * totals_b + s * BINS, wanted, BINS)
    chosen_set = indices + b64 * indices_b + s * indices_s
    _write_forced(chosen_set, length, budget, recent, sink, 256)
    room = ((first - turn * window).to(tl.int64) * tl.num_programs(0) + s * own) * CHUNK
    _choose_among(
        candidate_keys + room,
        candidate_tokens + room,
        num_candidates,
        wanted - num_above,
        chosen_set + sink + num_above,
    )


@triton.jit
def _choose_among(keys, tokens, count, wanted, chosen):
    """Writes the tokens of the `wanted` largest of `count` keys, the earlier of equal ones."""
    if count <= _FEW:
        _choose_among_held(keys, tokens, count, wanted, chosen, _FEW)
    elif count <= _MANY:
        _choose_among_held(keys, tokens, count, wanted, chosen, _MANY)
    else:
        _choose_among_many(keys, tokens, count, wanted, chosen)


@triton.jit
def _choose_among_held(keys, tokens, count, wanted, chosen, HELD: tl.constexpr):
    entry = tl.arange(0, HELD)
    real = entry < count
    key = tl.load(keys + entry, mask=real, other=0)
    token = tl.load(tokens + entry, mask=real, other=0)
    _write_largest(key, token, real, _threshold(key, real, wanted), wanted, chosen)


@triton.jit
def _choose_among_many(keys, tokens, count, wanted, chosen):
    """As `_choose_among`, for more keys than a program holds."""
    entry = tl.arange(0, _MANY)
    low, high = _MOST, _LEAST
    for start in range(0, count, _MANY):
        real = start + entry < count
        key = tl.load(keys + start + entry, mask=real, other=0)
        low = tl.minimum(low, tl.min(tl.where(real, key, _MOST)))
        high = tl.maximum(high, tl.max(tl.where(real, key, _LEAST)))
    while low < high:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reached = _count_reaching(keys, count, middle)
        if reached >= wanted:
            low = middle
        else:
            high = middle - 1
        if reached == wanted:
            high = middle
    num_above = _count_reaching(keys, count, low + 1) if low < _MOST else 0
    above_written, equal_written = 0, 0
    for start in range(0, count, _MANY):
        real = start + entry < count
        key = tl.load(keys + start + entry, mask=real, other=0)
        token = tl.load(tokens + start + entry, mask=real, other=0)
        above, equal = real & (key > low), real & (key == low)
        ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        tl.store(chosen + above_written + (ranks & 0xFFFF) - 1, token, mask=above)
        place = num_above + equal_written + (ranks >> 16) - 1
        tl.store(chosen + place, token, mask=equal & (place < wanted))
        above_written += tl.sum(above.to(tl.int32))
        equal_written += tl.sum(equal.to(tl.int32))


@triton.jit
def _count_reaching(keys, count, threshold):
    """How many of `count` keys reach a threshold."""
    entry = tl.arange(0, _MANY)
    reached = 0
    for start in range(0, count, _MANY):
        key = tl.load(keys + start + entry, mask=start + entry < count, other=0)
        reached += tl.sum(((start + entry < count) & (key >= threshold)).to(tl.int32))
    return reached


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
    rounds = rounds_for(batch, capacity, sets, _bytes(sets))
    lists = _Lists.room(indices, rounds, _IMPORTANCE_BINS, kept=False)
    totals = torch.zeros(batch, sets * _IMPORTANCE_BINS, dtype=torch.int32, device=indices.device)
    for turn in range(rounds.number):
        _count_and_choose(importance, rounds, turn, lengths, choice, totals, lists, indices)


@dataclass(frozen=True)
class _Lists:
    """What the launches of a round leave for each other, by chunks.

    Attributes:
        importance: [chunks, S, C], float32; what scores of more than a few heads became.
        reaching: [chunks, S, BINS], int32.
        candidate_keys, candidate_tokens: [chunks · S · C], int32.
    """

    importance: Tensor
    reaching: Tensor
    candidate_keys: Tensor
    candidate_tokens: Tensor

    @classmethod
    def room(cls, indices: Tensor, rounds: Rounds, bins: int, kept: bool) -> _Lists:
        sets = indices.shape[1]
        candidates = indices.new_empty(2, rounds.chunks * sets * rounds.tokens)
        return cls(
            indices.new_empty(rounds.chunks if kept else 0, sets, rounds.tokens, dtype=torch.float32),
            indices.new_empty(rounds.chunks, sets, bins),
            *candidates,
        )


def _bytes(sets: int) -> int:
    """What `_Lists` takes for each token, at most."""
    return sets * (4 + 2 + 8)


class Choosing:
    """Selection from scores: makes its room before attention writes the scores, so that nothing is half done.

    Args:
        query: [B, ..., Hq, D].
        kv: the cache.
        choice: how many tokens, and which of them in any case.
        capacity: the longest that a sequence can become.
        tile: tokens that attention reads at once.
        tables: for each rule, the index sets that it writes, [B, S, K], int32; S is 1, Hkv or Hq.

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
            more_bytes=_bytes(max(sets)),
            coded=True,
        )
        for table in tables:
            check_rows(indices=table)
        rounds = self.scores.rounds
        self._lists = [
            _Lists.room(table, rounds, _SCORE_BINS, heads // table.shape[1] > _FEW_HEADS.value) for table in tables
        ]

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
    """The three launches of one round, from scores or from importances [B, S, T]."""
    batch, sets = indices.shape[:2]
    overlap = scratch.overlaps(indices.device)
    if isinstance(source, Scores):
        values, cached, strides = (source.values, source.tops, source.normalizers), source.lengths, (0, 0)
        kv_heads, _, group, tile = source.values.shape[1:]
        heads, coded = kv_heads * group // sets, source.coded
    else:
        values, cached, strides = (source,) * 3, lengths, (source.stride(0), source.stride(1))
        heads, group, tile, coded = 0, 1, rounds.tokens, False
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
        "CODED": coded,
    }
    programs = min(rounds.chunks * sets, scratch.multiprocessors(indices.device) * _PROGRAMS)
    turn_and_strides = batch, turn, rounds.window, *strides, totals.stride(0)
    candidates = lists.candidate_keys, lists.candidate_tokens
    warps = 4 if rounds.tokens < 2048 and heads <= 1 else 8
    _count_kernel[programs,](
        *values, *which, lists.importance, lists.reaching, totals, *turn_and_strides, **read, **shared, num_warps=warps
    )
    _write_above_kernel[programs,](
        *values,
        *which,
        lists.importance,
        lists.reaching,
        totals,
        *candidates,
        indices,
        *turn_and_strides,
        *indices.stride()[:2],
        **read,
        **shared,
        num_warps=warps,
    )
    _finish_kernel[sets, batch](
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
