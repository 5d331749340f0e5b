"""Selection: from importances, or from the scores themselves, to a set of indices, without a sort.

Three short launches. The first counts the importances of each chunk of tokens by coarse bins (the float's exponent and
its first mantissa bits); given scores it makes importances of them on the way. The second knows from the counts in
which bin the budget ends: it writes the tokens above that bin, and lists those in it as candidates. The third finds
the exact threshold among the candidates, by bisection. Where a chunk's tokens go follows from the counts of the chunks
before it, so that the same importances always give the same table. A short row of importances needs one launch: a
program holds all of it, and bisects at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.kernels import scratch

_LOG2_E = tl.constexpr(1.4426950408889634)
_BINS = tl.constexpr(256)
_HELD = 8192  # importances that one program can hold
_FEW, _MANY = tl.constexpr(2048), tl.constexpr(8192)  # candidates that a program holds, usually and at most
_LEAST, _MOST = tl.constexpr(-0x80000000), tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(importance):
    """Integers in the order of the floats."""
    bits = importance.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _bin(key):
    """A coarse bin that never falls as the key rises, below 224.

    Four bins an octave, from 2^-32 to 2^8 for positive numbers, from -2^8 to -2^-8 for negative ones. What lies
    outside shares the outermost bins: slower, but right.
    """
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


@triton.jit
def _count_kernel(
    values,  # [B, S, T] importances; with HEADS > 0 scores, [B, S * HEADS, T]
    normalizers,  # [B, S * HEADS]; with HEADS > 0
    lengths,
    budgets,
    recents,
    sink,
    importance,  # [B, S, T], written with HEADS > 0
    reaching,  # [B, S, chunks, BINS], written: importances of a chunk in each bin or above it
    totals,  # [B, S, BINS], added up over the chunks; zero before
    capacity,
    values_b,
    values_s,  # from head to head with HEADS > 0
    importance_b,
    importance_s,
    HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length, budget, recent = tl.load(lengths + b), tl.load(budgets + b), tl.load(recents + b)
    if length <= budget or chunk * CHUNK >= length - recent:
        return
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    free = (token >= sink) & (token < length - recent)
    there = token < capacity  # loads of whole vectors: what is not free is left out of the counts
    if HEADS == 0:
        value = tl.load(values + b * values_b + s * values_s + token, mask=there, other=0.0)
    else:
        value = tl.zeros([CHUNK], tl.float32)
        for first in tl.static_range(0, HEADS, HEAD_TILE):
            head = s * HEADS + first + tl.arange(0, HEAD_TILE)
            real = first + tl.arange(0, HEAD_TILE) < HEADS
            pointers = values + b * values_b + (head * values_s)[:, None] + token[None, :]
            score = tl.load(pointers, mask=real[:, None] & there[None, :], other=float("-inf"))
            normalizer = tl.load(normalizers + b * (tl.num_programs(1) * HEADS) + head, mask=real, other=0.0)
            value += tl.sum(tl.exp2((score - normalizer[:, None]) * _LOG2_E), 0)
        value = value / HEADS
        tl.store(importance + b * importance_b + s * importance_s + token, value, mask=there)
    counts = tl.histogram(_bin(_ordered(value)), _BINS, mask=free)
    row = b * tl.num_programs(1) + s
    bins = tl.arange(0, _BINS)
    tl.store(reaching + (row * tl.num_programs(0) + chunk) * _BINS + bins, tl.cumsum(counts, 0, reverse=True))
    tl.atomic_add(totals + row * _BINS + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _border(totals, wanted):
    """The bin in which the budget ends, how many importances lie above it, and how many in it."""
    bins = tl.arange(0, _BINS)
    reach = tl.cumsum(tl.load(totals + bins), 0, reverse=True)
    border = tl.sum((reach >= wanted).to(tl.int32)) - 1
    num_above = tl.sum(tl.where(bins == border + 1, reach, 0))
    return border, num_above, tl.sum(tl.where(bins == border, reach, 0)) - num_above


@triton.jit
def _write_above_kernel(
    importance,
    lengths,
    budgets,
    recents,
    sink,
    reaching,
    totals,
    candidate_keys,  # [B, S, T], written
    candidate_tokens,
    indices,
    capacity,
    importance_b,
    importance_s,
    indices_b,
    indices_s,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length, budget, recent = tl.load(lengths + b), tl.load(budgets + b), tl.load(recents + b)
    row = b * tl.num_programs(1) + s
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(importance + b * importance_b + s * importance_s + token, mask=token < capacity, other=0.0)
    chosen_set = indices + b * indices_b + s * indices_s
    if length <= budget:  # chosen whole
        tl.store(chosen_set + token, token, mask=token < length)
        return
    if chunk * CHUNK >= length - recent:
        return
    border, _, _ = _border(totals + row * _BINS, budget - sink - recent)

    before = tl.arange(0, CHUNKS)
    earlier = reaching + (row * tl.num_programs(0) + before) * _BINS + border
    above_before = tl.sum(tl.load(earlier + 1, mask=before < chunk, other=0))
    candidates_before = tl.sum(tl.load(earlier, mask=before < chunk, other=0)) - above_before

    free = (token >= sink) & (token < length - recent)
    key = _ordered(value)
    its_bin = _bin(key)
    above, inside = free & (its_bin > border), free & (its_bin == border)
    ranks = tl.cumsum(above.to(tl.int32) + (inside.to(tl.int32) << 16), 0)  # both counts in one scan
    tl.store(chosen_set + sink + above_before + (ranks & 0xFFFF) - 1, token, mask=above)
    place = row * capacity + candidates_before + (ranks >> 16) - 1
    tl.store(candidate_keys + place, key, mask=inside)
    tl.store(candidate_tokens + place, token, mask=inside)


@triton.jit
def _finish_kernel(
    lengths,
    budgets,
    recents,
    sink,
    totals,  # zero afterwards
    candidate_keys,
    candidate_tokens,
    indices,
    capacity,
    indices_b,
    indices_s,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length, budget, recent = tl.load(lengths + b), tl.load(budgets + b), tl.load(recents + b)
    if length <= budget:
        return
    row = b * tl.num_programs(0) + s
    wanted = budget - sink - recent
    _, num_above, num_candidates = _border(totals + row * _BINS, wanted)
    tl.store(totals + row * _BINS + tl.arange(0, _BINS), tl.zeros([_BINS], tl.int32))
    chosen_set = indices + b * indices_b + s * indices_s
    _write_forced(chosen_set, length, budget, recent, sink, 256)
    keys, tokens = candidate_keys + row * capacity, candidate_tokens + row * capacity
    _choose_among(keys, tokens, num_candidates, wanted - num_above, chosen_set + sink + num_above)


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


def select_tokens(
    importance: Tensor, lengths: Tensor, budgets: Tensor, recents: Tensor, sink_tokens: int, indices: Tensor
) -> None:
    """As `reference.select_tokens`, for float32 importances; among equal importances the earlier token is chosen."""
    batch, sets, capacity = importance.shape
    if capacity <= _HELD:
        held = max(128, triton.next_power_of_2(capacity))
        _choose_held_kernel[sets, batch](
            importance,
            lengths,
            budgets,
            recents,
            sink_tokens,
            indices,
            capacity,
            *importance.stride()[:2],
            *indices.stride()[:2],
            HELD=held,
            OVERLAP=scratch.overlaps(indices.device),
            launch_pdl=scratch.overlaps(indices.device),
            num_warps=max(1, min(8, held // 1024)),
        )
    else:
        _count_and_choose(importance, None, importance, lengths, budgets, recents, sink_tokens, indices)


def select_by_scores(
    scores: Tensor,
    normalizers: Tensor,
    lengths: Tensor,
    budgets: Tensor,
    recents: Tensor,
    sink_tokens: int,
    indices: Tensor,
) -> None:
    """Writes the index sets that mean probabilities choose; the sets share the query heads evenly, in order.

    Args:
        scores: [B, Hq, T], float32; entries past a sequence's length are not read.
        normalizers: [B, Hq], float32; log of the sum of the exponentials of a head's scores.
        lengths, budgets, recents, sink_tokens: as for `select_tokens`.
        indices: [B, S, K], int32, written; S is 1, Hkv or Hq.
    """
    batch, _, capacity = scores.shape
    importance = scores.new_empty(batch, indices.shape[1], capacity)
    _count_and_choose(scores, normalizers, importance, lengths, budgets, recents, sink_tokens, indices)


def _count_and_choose(
    values: Tensor,
    normalizers: Tensor | None,
    importance: Tensor,
    lengths: Tensor,
    budgets: Tensor,
    recents: Tensor,
    sink_tokens: int,
    indices: Tensor,
) -> None:
    batch, sets, capacity = importance.shape
    heads = 0 if normalizers is None else values.shape[1] // sets
    chunk = max(512, min(2048, triton.next_power_of_2(capacity * sets * batch // 256)))
    chunks = triton.cdiv(capacity, chunk)
    overlap = scratch.overlaps(indices.device)
    bins = int(_BINS.value)
    grid = (chunks, sets, batch)
    reaching = indices.new_empty(batch * sets * chunks * bins)
    totals = scratch.zeros("totals", batch * sets * bins, indices.device)
    _count_kernel[grid](
        values,
        values if normalizers is None else normalizers,
        lengths,
        budgets,
        recents,
        sink_tokens,
        importance,
        reaching,
        totals,
        capacity,
        *values.stride()[:2],
        *importance.stride()[:2],
        HEADS=heads,
        HEAD_TILE=max(1, min(triton.next_power_of_2(max(heads, 1)), 8192 // chunk)),
        CHUNK=chunk,
        OVERLAP=overlap,
        num_warps=4 if heads <= 1 else 8,
        launch_pdl=overlap,
    )
    candidate_keys, candidate_tokens = indices.new_empty(2, batch * sets * capacity)
    _write_above_kernel[grid](
        importance,
        lengths,
        budgets,
        recents,
        sink_tokens,
        reaching,
        totals,
        candidate_keys,
        candidate_tokens,
        indices,
        capacity,
        *importance.stride()[:2],
        *indices.stride()[:2],
        CHUNK=chunk,
        CHUNKS=triton.next_power_of_2(chunks),
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
    _finish_kernel[sets, batch](
        lengths,
        budgets,
        recents,
        sink_tokens,
        totals,
        candidate_keys,
        candidate_tokens,
        indices,
        capacity,
        *indices.stride()[:2],
        OVERLAP=overlap,
        num_warps=8,
        launch_pdl=overlap,
    )
