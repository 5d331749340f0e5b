"""How many tokens a round of lossless decoding drafts, and what came of the rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tidaldecode.errors import InputError

Lossless = int | Literal["auto"]

_LENGTHS = (1, 2, 4, 8, 16)  # few, for on a GPU each has a captured pass of its own
_DRAFT_STEP = 0.4  # cost of a draft step over that of a pass with full attention, as at long contexts on a GPU
_MEMORY = 0.9  # weight of what was seen before, each round


@dataclass
class Rounds:
    """What the rounds of one generation drafted and accepted.

    Attributes:
        drafted: tokens that each round drafted for each sequence.
        sequences: sequences that each round was for: those that were not done.
        tokens: tokens that came out of each round, of all these sequences together; in a sequence's last round also
            those behind its end of sequence, which nobody sees.
    """

    drafted: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, drafted: int, tokens: list[int]) -> None:
        """Records a round and the tokens that came out of it for each sequence that was not done."""
        self.drafted.append(drafted)
        self.sequences.append(len(tokens))
        self.tokens.append(sum(tokens))

    @property
    def accepted_per_round(self) -> float | None:
        """Tokens that came out of a round for a sequence, the one of full attention's own included; the mean."""
        return sum(self.tokens) / sum(self.sequences) if self.sequences else None


class DraftLength:
    """Tokens to draft in the next round: the same always, or by the acceptance seen (`auto`).

    `auto` takes the length that gives most tokens for its cost, if each drafted token is accepted with the same
    probability: after T drafted tokens `(1 - a^(T+1)) / (1 - a)` are expected (Leviathan et al. 2023, equation 1). It
    looks at no clock, so that a seed gives the same tokens each time.

    Args:
        lossless: the length, or `auto`.
        most: new tokens that are wanted; no round drafts more.

    Raises:
        InputError: neither.
    """

    def __init__(self, lossless: Lossless, most: int | None = None) -> None:
        fixed = isinstance(lossless, int) and not isinstance(lossless, bool) and lossless >= 1
        if not fixed and lossless != "auto":
            raise InputError(f"lossless {lossless!r}: give the tokens to draft in a round, at least 1, or 'auto'")
        self.auto = lossless == "auto"
        self.longest = max(_LENGTHS) if self.auto else int(lossless)
        if most is not None:
            self.longest = min(self.longest, most)
        self._length = min(8, self.longest) if self.auto else self.longest
        self._accepted, self._tested = 7.0, 8.0  # what a plan made for the model does, until its own rounds say more

    def __int__(self) -> int:
        return self._length

    def saw(self, drafted: int, accepted: list[int]) -> None:
        """Learns from a round: how many of the `drafted` tokens each sequence accepted."""
        if not self.auto or drafted == 0:
            return
        tested = sum(min(count + 1, drafted) for count in accepted)  # those behind the first refused one were not
        share = 1 / max(1, len(accepted))
        self._accepted = _MEMORY * self._accepted + share * sum(accepted)
        self._tested = _MEMORY * self._tested + share * tested
        self._length = max((length for length in _LENGTHS if length <= self.longest), key=self._tokens_for_cost)

    def _tokens_for_cost(self, length: int) -> float:
        rate = min(self._accepted / self._tested, 0.999)
        return (1 - rate ** (length + 1)) / (1 - rate) / (1 + _DRAFT_STEP * length)
