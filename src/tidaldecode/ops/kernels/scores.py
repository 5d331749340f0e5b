"""Scores of the cached tokens, as attention leaves them for selection, and the mean probabilities that they stand for.

The softmax normalizer is known only when attention is done, so probabilities are a second pass, over scores and not
over K. To keep that pass in the L2 cache, scores of 16-bit queries take 16 bits: how far a score lies below the largest
that its program had seen by then, in steps of 1/1024 octave up to 64 octaves. A probability is off by 0.04 % at most,
far below what the 16 bits of q and k leave uncertain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidaldecode.ops.rounds import Rounds, columns_of, rounds_for, score_bytes
from tidaldecode.ops.values import KV

CODE_STEPS = 1024
"""Steps of a code in an octave (a factor of two of the probability)."""

_STEPS = tl.constexpr(CODE_STEPS)


@dataclass(frozen=True)
class Scores:
    """Scores of one round of sequences, chunk by chunk, in tiles of tokens that attention reads at once.

    A program of attention writes a tile for the `G = Hq // Hkv` query heads of a KV head, in one piece: pieces of 512
    bytes reach memory faster than as many bytes head by head. Where codes of keys are scored, a tile has rows of `pair`
    tokens instead, with the scores of all heads of a token together, as the product leaves them; `N` is `pair` times
    `G` rounded up to a power of two. Logarithms have base 2.

    Attributes:
        values: [chunks, Hkv, tiles, G, tile], uint16 codes, or the scores themselves, float32; of codes of keys
            [chunks, Hkv, tiles, rows, N], uint16.
        tops: [chunks, Hkv, tiles, G or N], float32; the score that the codes of a tile and head (and token of a row)
            count from.
        normalizers: [B, Hq], float32; log of the sum of the exponentials of a head's scores.
        counts: [B, n], int32; attention writes zeros here, for selection to count in.
        lengths: [B], int32; tokens in the cache, by which sequences are cut into chunks.
        budgets: [B], int32; sequences that are no longer need no scores.
        rounds: how the sequences are dealt to rounds.
        pair: tokens of a row; 0 for attention's tiles.
    """

    values: Tensor
    tops: Tensor
    normalizers: Tensor
    counts: Tensor
    lengths: Tensor
    budgets: Tensor
    rounds: Rounds
    pair: int = 0

    @property
    def coded(self) -> bool:
        """Whether the values are codes."""
        return self.values.dtype == torch.uint16

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.values.shape[3] * self.pair if self.pair else self.values.shape[4]

    @classmethod
    def room(
        cls,
        query: Tensor,
        kv: KV,
        budgets: Tensor,
        capacity: int,
        *,
        tile: int,
        sets: int,
        counts: int,
        more_bytes: int,
        coded: bool,
        pair: int = 0,
    ) -> Scores:
        """Room for the scores of a batch.

        Args:
            query: [B, ..., Hq, D].
            kv: the cache, whose lengths cut the sequences into chunks.
            budgets: as the attribute.
            capacity: the longest that a sequence can become.
            tile: tokens that attention reads at once; a divisor of a chunk.
            sets: index sets of a sequence that are worked on at once.
            counts: counters of a sequence.
            more_bytes: memory that selection takes beside the scores, for each token.
            coded: whether to keep codes; only for 16-bit queries.
            pair: as the attribute; scores of codes of keys are always kept as codes.
        """
        coded = pair > 0 or (coded and query.dtype != torch.float32)
        batch, heads, num_kv_heads = len(query), query.shape[-2], kv.k.shape[2]
        group = heads // num_kv_heads
        rows, columns = group, tile
        if pair:
            rows, columns = tile // pair, columns_of(group, pair)
        token_bytes = score_bytes(num_kv_heads, group, tile, pair, 2 if coded else 4) + more_bytes
        rounds = rounds_for(batch, capacity, sets, token_bytes)
        tiles = rounds.chunks, num_kv_heads, rounds.tokens // tile
        return cls(
            query.new_empty(*tiles, rows, columns, dtype=torch.uint16 if coded else torch.float32),
            query.new_empty(*tiles, columns if pair else rows, dtype=torch.float32),
            query.new_empty(batch, heads, dtype=torch.float32),
            query.new_empty(batch, counts, dtype=torch.int32),
            kv.lengths,
            budgets,
            rounds,
            pair,
        )


@triton.jit
def _from_code(code):
    """Octaves below the top. A conversion would be slow: the code becomes the last bits of a number past 2^23."""
    number = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return number * (1.0 / _STEPS)


@triton.jit
def mean_probabilities(
    values,  # see `Scores`
    tops,
    normalizers,  # [Hq], of the sequence
    chunk,
    head,
    ALL_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    PAIR: tl.constexpr,
    CODED: tl.constexpr,
):
    """The probability of each token of a chunk, the mean over `HEADS` heads from `head` on: [CHUNK]."""
    if PAIR > 0:
        sums = _sums_of_pairs(
            values, tops, normalizers, chunk, head, ALL_HEADS // GROUP, GROUP, HEADS, CHUNK // TILE, TILE // PAIR, PAIR
        )
    else:
        TILES: tl.constexpr = CHUNK // TILE
        tile = tl.arange(0, TILES)
        token = tl.arange(0, TILE)
        sums = tl.zeros([TILES, TILE], tl.float32)
        for each in tl.static_range(HEADS):
            h = head + each
            first_tile = (chunk.to(tl.int64) * (ALL_HEADS // GROUP) + h // GROUP) * TILES
            row = (first_tile + tile) * GROUP + h % GROUP
            normalizer = tl.load(normalizers + h)
            value = tl.load(values + (row * TILE)[:, None] + token[None, :])
            if CODED:
                top = tl.load(tops + row) - normalizer
                sums += tl.exp2(top[:, None] - _from_code(value))
            else:
                sums += tl.exp2(value - normalizer)
    return tl.reshape(sums, [CHUNK]) / HEADS


@triton.jit
def _sums_of_pairs(
    values,
    tops,
    normalizers,
    chunk,
    head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """The sum of the probabilities of each token, [TILES, ROWS, PAIR], from rows of tokens."""
    OWN: tl.constexpr = triton.next_power_of_2(GROUP)
    BLOCK_G: tl.constexpr = OWN if OWN * PAIR > 8 else 8 // PAIR
    COLUMNS: tl.constexpr = PAIR * BLOCK_G
    tile, row, column = tl.arange(0, TILES), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    EVEN: tl.constexpr = HEADS % GROUP == 0 or GROUP % HEADS == 0  # else a set may begin within a group
    NUMBER: tl.constexpr = (HEADS + GROUP - 1) // GROUP + (0 if EVEN else 1)
    sums = tl.zeros([TILES, ROWS, PAIR], tl.float32)
    for each in tl.static_range(NUMBER):
        kv_head = head // GROUP + each
        h = kv_head * GROUP + column % BLOCK_G
        mine = (h >= head) & (h < head + HEADS) & (column % BLOCK_G < GROUP)
        place = (chunk.to(tl.int64) * KV_HEADS + tl.minimum(kv_head, KV_HEADS - 1)) * TILES + tile
        normalizer = tl.load(normalizers + h, mask=mine, other=float("inf"))  # others' probabilities are 0
        top = tl.load(tops + (place * COLUMNS)[:, None] + column[None, :]) - normalizer[None, :]
        rows = place[:, None] * (ROWS * COLUMNS) + (row * COLUMNS)[None, :]  # [TILES, ROWS]
        value = tl.load(values + (rows[:, :, None] + column[None, None, :]))
        terms = tl.exp2(top[:, None, :] - _from_code(value))
        sums += tl.sum(tl.reshape(terms, [TILES, ROWS, PAIR, BLOCK_G]), 3)
    return sums
