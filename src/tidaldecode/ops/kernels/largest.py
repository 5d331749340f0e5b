"""The largest of many keys, exactly, without a sort: by bisection of a threshold, in what a program holds or reads."""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST, _MOST = tl.constexpr(-0x80000000), tl.constexpr(0x7FFFFFFF)


@triton.jit
def ordered(importance):
    """Integers in the order of the floats; any NaN is the largest, as for `torch.topk`."""
    bits = tl.where(importance == importance, importance.to(tl.int32, bitcast=True), 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def threshold_of(key, real, wanted):
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
def write_largest(key, token, real, threshold, wanted, chosen):
    """Writes the tokens whose keys exceed the threshold, and of those that equal it the first, `wanted` in all."""
    above, equal = real & (key > threshold), real & (key == threshold)
    ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # both counts in one scan
    num_above = tl.sum(above.to(tl.int32))
    tl.store(chosen + (ranks & 0xFFFF) - 1, token, mask=above)
    place = num_above + (ranks >> 16) - 1
    tl.store(chosen + place, token, mask=equal & (place < wanted))


@triton.jit
def write_forced(chosen_set, length, budget, recent, sink, BLOCK: tl.constexpr):
    """Sinks at the front of a set, recent tokens at its end."""
    for start in range(0, sink, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        tl.store(chosen_set + entry, entry, mask=entry < sink)
    for start in range(0, recent, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        tl.store(chosen_set + budget - recent + entry, length - recent + entry, mask=entry < recent)


@triton.jit
def choose_among(keys, tokens, count, wanted, chosen, FEW: tl.constexpr, MANY: tl.constexpr):
    """Writes the tokens of the `wanted` largest of `count` keys, the earlier of equal ones.

    A program holds `FEW` candidates, usually, and `MANY` at most; it reads more of them once for each bisection.
    """
    if count <= FEW:
        _choose_among_held(keys, tokens, count, wanted, chosen, FEW)
    elif FEW < MANY and count <= MANY:
        _choose_among_held(keys, tokens, count, wanted, chosen, MANY)
    else:
        _choose_among_many(keys, tokens, count, wanted, chosen, MANY)


@triton.jit
def _choose_among_held(keys, tokens, count, wanted, chosen, HELD: tl.constexpr):
    entry = tl.arange(0, HELD)
    real = entry < count
    # past the first-level cache: other multiprocessors may have written these in the same launch
    key = tl.load(keys + entry, mask=real, other=0, cache_modifier=".cg")
    token = tl.load(tokens + entry, mask=real, other=0, cache_modifier=".cg")
    write_largest(key, token, real, threshold_of(key, real, wanted), wanted, chosen)


@triton.jit
def _choose_among_many(keys, tokens, count, wanted, chosen, MANY: tl.constexpr):
    """As `choose_among`, for more keys than a program holds."""
    entry = tl.arange(0, MANY)
    low, high = _MOST, _LEAST
    for start in range(0, count, MANY):
        real = start + entry < count
        key = tl.load(keys + start + entry, mask=real, other=0, cache_modifier=".cg")
        low = tl.minimum(low, tl.min(tl.where(real, key, _MOST)))
        high = tl.maximum(high, tl.max(tl.where(real, key, _LEAST)))
    while low < high:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reached = _count_reaching(keys, count, middle, MANY)
        if reached >= wanted:
            low = middle
        else:
            high = middle - 1
        if reached == wanted:
            high = middle
    num_above = _count_reaching(keys, count, low + 1, MANY) if low < _MOST else 0
    above_written, equal_written = 0, 0
    for start in range(0, count, MANY):
        real = start + entry < count
        key = tl.load(keys + start + entry, mask=real, other=0, cache_modifier=".cg")
        token = tl.load(tokens + start + entry, mask=real, other=0, cache_modifier=".cg")
        above, equal = real & (key > low), real & (key == low)
        ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        tl.store(chosen + above_written + (ranks & 0xFFFF) - 1, token, mask=above)
        place = num_above + equal_written + (ranks >> 16) - 1
        tl.store(chosen + place, token, mask=equal & (place < wanted))
        above_written += tl.sum(above.to(tl.int32))
        equal_written += tl.sum(equal.to(tl.int32))


@triton.jit
def _count_reaching(keys, count, threshold, MANY: tl.constexpr):
    """How many of `count` keys reach a threshold."""
    entry = tl.arange(0, MANY)
    reached = 0
    for start in range(0, count, MANY):
        key = tl.load(keys + start + entry, mask=start + entry < count, other=0, cache_modifier=".cg")
        reached += tl.sum(((start + entry < count) & (key >= threshold)).to(tl.int32))
    return reached
