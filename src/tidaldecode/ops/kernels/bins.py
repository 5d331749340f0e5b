"""Selection in three launches, or two, from counts of coarse bins: see `select`."""

from __future__ import annotations

import triton
import triton.language as tl

from tidaldecode.ops.kernels.chunks import chunks_in_round, sequence_of
from tidaldecode.ops.kernels.largest import choose_among, ordered, write_forced
from tidaldecode.ops.kernels.scores import mean_probabilities

SHORT_SHIFT = 15
"""What a short key leaves out of an importance that is not negative: all but its exponent and 8 bits."""

_SHORT_SHIFT = tl.constexpr(SHORT_SHIFT)
_BEFORE = tl.constexpr(128)  # earlier chunks whose counts are added up at once


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
def _importance(
    values,
    tops,
    normalizers,
    b,
    s,
    place,
    token,
    length,
    values_b,
    values_s,
    SETS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    PAIR: tl.constexpr,
    CODED: tl.constexpr,
):
    """Importances of a chunk's tokens to a set: as they are given, or from scores."""
    if HEADS == 0:
        value = tl.load(values + b.to(tl.int64) * values_b + s * values_s + token, mask=token < length, other=0.0)
    else:
        of_sequence = normalizers + b * (SETS * HEADS)
        value = mean_probabilities(
            values, tops, of_sequence, place, s * HEADS, SETS * HEADS, GROUP, HEADS, CHUNK, TILE, PAIR, CODED
        )
    return value


@triton.jit(do_not_specialize=["batch", "turn", "window"])
def count_kernel(
    values,  # [B, S, T] importances; with HEADS > 0 scores, see `Scores`
    tops,
    normalizers,
    cached,  # [B]; tokens of the sequences, by which they are cut into chunks
    lengths,  # [B]; those to choose from
    budgets,
    recents,
    sink,
    importance,  # [chunks, S, CHUNK], written if KEPT: float32, or the importances' short keys, uint16
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
    PAIR: tl.constexpr,
    CODED: tl.constexpr,
    BINS: tl.constexpr,
    KEPT: tl.constexpr,
    SHORT: tl.constexpr,
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
            value = _importance(
                values, tops, normalizers, b, s, place, token, length, values_b, values_s,
                SETS, HEADS, GROUP, CHUNK, TILE, PAIR, CODED,
            )  # fmt: skip
            key = ordered(value)
            if SHORT:
                tl.store(importance + row * CHUNK + tl.arange(0, CHUNK), (key >> _SHORT_SHIFT).to(tl.uint16))
            elif KEPT:
                tl.store(importance + row * CHUNK + tl.arange(0, CHUNK), value)
            free = (token >= sink) & (token < length - recent)
            its_bin = _bin(key, budget - sink - recent, HEADS > 0)
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
def write_above_kernel(
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
    tickets,  # [B, S], zero before and after; with FINISH
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
    PAIR: tl.constexpr,
    CODED: tl.constexpr,
    BINS: tl.constexpr,
    KEPT: tl.constexpr,
    SHORT: tl.constexpr,
    FINISH: tl.constexpr,  # the last program of a set does what `finish_kernel` does
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
            if SHORT:
                key = tl.load(importance + row * CHUNK + tl.arange(0, CHUNK)).to(tl.int32)
            elif KEPT:
                key = ordered(tl.load(importance + row * CHUNK + tl.arange(0, CHUNK)))
            else:
                value = _importance(
                    values, tops, normalizers, b, s, place, token, length, values_b, values_s,
                    SETS, HEADS, GROUP, CHUNK, TILE, PAIR, CODED,
                )  # fmt: skip
                key = ordered(value)
            wanted = budget - sink - recent
            border, num_above, num_candidates = _border(totals + b64 * totals_b + s * BINS, wanted, BINS)
            above_before, reached_before = 0, 0
            first_row = row - (chunk - first) * SETS
            for start_before in range(0, chunk - first, _BEFORE):
                earlier = start_before + tl.arange(0, _BEFORE)
                counts = reaching + (first_row + earlier * SETS) * BINS + border
                there = earlier < chunk - first
                above_before += tl.sum(tl.load(counts + 1, mask=there, other=0))
                reached_before += tl.sum(tl.load(counts, mask=there, other=0))

            free = (token >= sink) & (token < length - recent)
            its_bin = _bin(key << _SHORT_SHIFT if SHORT else key, wanted, HEADS > 0)
            above, inside = free & (its_bin > border), free & (its_bin == border)
            ranks = tl.cumsum(above.to(tl.int32) + (inside.to(tl.int32) << 16), 0)  # both counts in one scan
            tl.store(chosen_set + sink + above_before + (ranks & 0xFFFF) - 1, token, mask=above)
            room = (first - turn * window).to(tl.int64) * SETS + s * own
            entry = room * CHUNK + reached_before - above_before + (ranks >> 16) - 1
            tl.store(candidate_keys + entry, key, mask=inside)
            tl.store(candidate_tokens + entry, token, mask=inside)
            if FINISH:
                tl.debug_barrier()  # all threads' stores come before the ticket
                ticket = tickets + b * SETS + s
                parts = (length - recent + CHUNK - 1) // CHUNK
                if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
                    tl.store(ticket, 0)
                    write_forced(chosen_set, length, budget, recent, sink, 256)
                    room *= CHUNK
                    choose_among(
                        candidate_keys + room,
                        candidate_tokens + room,
                        num_candidates,
                        wanted - num_above,
                        chosen_set + sink + num_above,
                        1024,
                        1024,
                    )


@triton.jit(do_not_specialize=["batch", "turn", "window"])
def finish_kernel(
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
    write_forced(chosen_set, length, budget, recent, sink, 256)
    room = ((first - turn * window).to(tl.int64) * tl.num_programs(0) + s * own) * CHUNK
    choose_among(
        candidate_keys + room,
        candidate_tokens + room,
        num_candidates,
        wanted - num_above,
        chosen_set + sink + num_above,
        1024,
        8192,
    )
