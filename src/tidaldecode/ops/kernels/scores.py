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

from tidaldecode.ops.kernels.chunks import Rounds, rounds_for
from tidaldecode.ops.values import KV

CODE_STEPS = 1024
"""Steps of a code in an octave (a factor of two of the probability)."""

_STEPS = tl.constexpr(CODE_STEPS)


@dataclass(frozen=True)
class Scores:
    """Scores of one round of sequences, chunk by chunk, in tiles of tokens that attention reads at once.

    A program of attention writes a tile for the `G = Hq // Hkv` query heads of a KV head, in one piece: pieces of 512
    bytes reach memory faster than as many bytes head by head. Logarithms have base 2.

    Attributes:
        values: [chunks, Hkv, tiles, G, tile]; uint16 codes, or the scores themselves, float32.
        tops: [chunks, Hkv, tiles, G], float32; the score that the codes of a tile and head count from.
        normalizers: [B, Hq], float32; log of the sum of the exponentials of a head's scores.
        counts: [B, n], int32; attention writes zeros here, for selection to count in.
        lengths: [B], int32; tokens in the cache, by which sequences are cut into chunks.
        budgets: [B], int32; sequences that are no longer need no scores.
        rounds: how the sequences are dealt to rounds.
    """

    values: Tensor
    tops: Tensor
    normalizers: Tensor
    counts: Tensor
    lengths: Tensor
    budgets: Tensor
    rounds: Rounds

    @property
    def coded(self) -> bool:
        """Whether the values are codes."""
        return self.values.dtype == torch.uint16

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
        """
        coded = coded and query.dtype != torch.float32
        batch, heads, num_kv_heads = len(query), query.shape[-2], kv.k.shape[2]
        rounds = rounds_for(batch, capacity, sets, heads * (2 if coded else 4) + more_bytes)
        tiles = rounds.chunks, num_kv_heads, rounds.tokens // tile, heads // num_kv_heads
        return cls(
            query.new_empty(*tiles, tile, dtype=torch.uint16 if coded else torch.float32),
            query.new_empty(tiles, dtype=torch.float32),
            query.new_empty(batch, heads, dtype=torch.float32),
            query.new_empty(batch, counts, dtype=torch.int32),
            kv.lengths,
            budgets,
            rounds,
        )


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
    CODED: tl.constexpr,
):
    """The probability of each token of a chunk, the mean over `HEADS` heads from `head` on: [CHUNK]."""
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
            sums += tl.exp2(top[:, None] - value.to(tl.float32) * (1.0 / _STEPS))
        else:
            sums += tl.exp2(value - normalizer)
    return tl.reshape(sums, [CHUNK]) / HEADS
