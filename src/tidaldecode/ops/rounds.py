"""Memory that lies between attention and selection, and how sequences are dealt to rounds so that it is bounded.

Without Triton: what serves a model asks for this memory before a kernel is there.
"""

from __future__ import annotations

from dataclasses import dataclass

_SMALLEST, _LARGEST = 512, 2048  # tokens of a chunk; multiples of what attention reads at a time
_FEW = 256  # chunks that are too few to keep a GPU busy
_TILE = 64  # tokens of codes that a program scores at a time, at least
_COLUMNS, _ROWS, _DEPTH = 8, 16, 32  # of the smallest product of 8-bit integers; the rows are those of one warp

ROOM = 2**29
"""Bytes that a round may take, but for its last sequence."""

LEAST_TILE = 16
"""Tokens that attention reads at once, at least."""


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
    tokens = max(_SMALLEST, min(_LARGEST, power_of_two(batch * capacity * sets // _FEW)))
    longest = -(-capacity // tokens)
    window = max(1, min(batch * longest, ROOM // (tokens * token_bytes)))
    number = -(-((batch - 1) * longest + 1) // window)
    return Rounds(tokens, number, window, min(batch * longest, window + longest - 1))


def round_bytes(batch: int, capacity: int, token_bytes: int) -> int:
    """Most memory of a round of `rounds_for` of so many sequences or fewer, however long its chunks are."""
    of_one = -(-capacity // _LARGEST) * _LARGEST * token_bytes
    return min(ROOM + of_one, batch * of_one)


def score_bytes(kv_heads: int, group: int, tile: int, pair: int = 0, size: int = 2) -> int:
    """Memory of the `Scores` of a token.

    Args:
        kv_heads: KV heads.
        group: query heads of each.
        tile: tokens of a tile.
        pair: as in `Scores`.
        size: bytes of a score; those of codes of keys take 2.
    """
    numbers = tile * (columns_of(group, pair) // pair if pair else group)
    tops = columns_of(group, pair) if pair else group
    return kv_heads * -(-(numbers * size + tops * 4) // tile)


def list_bytes(sets: int) -> int:
    """Memory of what launches of a selection leave for each other, for each token, at most."""
    return sets * (4 + 2 + 8)


def pair_of(width: int, group: int) -> int:
    """Tokens of a row of the product: of codes of so many bytes, for groups of so many query heads."""
    width = power_of_two(width)
    return max(_DEPTH // width, min(_COLUMNS // min(_COLUMNS, power_of_two(group)), 256 // width), 1)


def tile_of(pair: int) -> int:
    """Tokens of codes that a program scores at a time."""
    return max(_TILE, _ROWS * pair)


def columns_of(group: int, pair: int) -> int:
    """Columns of the product: the query heads of a group, for each token of a row."""
    return pair * max(power_of_two(group), _COLUMNS // pair)


def power_of_two(number: int) -> int:
    """The smallest that is no smaller, 1 at least."""
    return 1 << max(0, number - 1).bit_length()
