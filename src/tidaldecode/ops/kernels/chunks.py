"""What lies between attention and selection, by chunks of tokens: the chunks of all sequences follow each other.

So memory and work go by the tokens that are there and not by the longest that a sequence can become. Memory is
bounded, too: where the sequences could need more of it, they are attended to in rounds. A round takes as many whole
sequences as fit; which they are follows from the lengths on the device, so that a captured CUDA graph stays right as
they grow. Rounds that no sequence is left for end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

_SMALLEST, _LARGEST = 512, 2048  # tokens of a chunk; multiples of what attention reads at a time
_FEW = 256  # chunks that are too few to keep a GPU busy

_ROOM = 2**29
"""Bytes that a round may take, but for its last sequence."""


@dataclass(frozen=True)
class Rounds:
    """How sequences are dealt to rounds.

    A sequence belongs to the round `first // window`, where `first` counts the chunks of all sequences before it.

    Attributes:
        tokens: tokens of a chunk.
        number: rounds that the longest possible sequences need.
        window: chunks between the first ones of two rounds.
        chunks: most chunks of a round.
    """

    tokens: int
    number: int
    window: int
    chunks: int


def rounds_for(batch: int, capacity: int, sets: int, token_bytes: int) -> Rounds:
    """The rounds of a batch.

    Args:
        batch: sequences.
        capacity: the longest that a sequence can become, in tokens.
        sets: index sets of a sequence, each of which has work for every chunk.
        token_bytes: memory that a round takes for each token.
    """
    tokens = max(_SMALLEST, min(_LARGEST, triton.next_power_of_2(batch * capacity * sets // _FEW)))
    longest = triton.cdiv(capacity, tokens)
    window = max(1, min(batch * longest, _ROOM // (tokens * token_bytes)))
    return Rounds(tokens, triton.cdiv((batch - 1) * longest + 1, window), window, window + longest - 1)


@triton.jit
def chunks_in_round(lengths, batch, turn, window, BATCH: tl.constexpr, CHUNK: tl.constexpr):
    """For a round: (its chunks, chunks of the sequences before it, chunks of each sequence [BATCH], their sums)."""
    index = tl.arange(0, BATCH)
    chunks = (tl.load(lengths + index, mask=index < batch, other=0) + CHUNK - 1) // CHUNK
    behind = tl.cumsum(chunks, 0)
    owner = (behind - chunks) // window
    before = tl.sum(tl.where(owner < turn, chunks, 0))
    return tl.sum(tl.where(owner == turn, chunks, 0)), before, chunks, behind


@triton.jit
def sequence_of(chunk, chunks, behind, batch, BATCH: tl.constexpr):
    """The sequence that a chunk belongs to, its chunks, and how many there are before them."""
    if BATCH == 1:  # known before the lengths are
        b, own, before = chunk * 0, tl.sum(chunks), chunk * 0
    else:
        index = tl.arange(0, BATCH)
        b = tl.minimum(tl.sum((behind <= chunk).to(tl.int32)), batch - 1)
        own = tl.sum(tl.where(index == b, chunks, 0))
        before = tl.sum(tl.where(index == b, behind, 0)) - own
    return b, own, before
