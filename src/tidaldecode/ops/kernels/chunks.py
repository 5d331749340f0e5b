"""What lies between attention and selection, by chunks of tokens: the chunks of all sequences follow each other.

So memory and work go by the tokens that are there and not by the longest that a sequence can become. Memory is
bounded, too: where the sequences could need more of it, they are attended to in rounds. A round takes as many whole
sequences as fit; which they are follows from the lengths on the device, so that a captured CUDA graph stays right as
they grow. Rounds that no sequence is left for end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
