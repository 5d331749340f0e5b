"""How many tokens to draft in a round of lossless decoding: always as many, or by what was measured (`auto`).

After T drafted tokens `(1 - a^(T+1)) / (1 - a)` come out of a round, if each is accepted with the same probability `a`
(Leviathan et al., ICML 2023, equation 1). A round takes T draft steps and a pass over T + 1 tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Literal

from tidaldecode.errors import InputError
from tidaldecode.hf.rounds import Pace

Lossless = int | Literal["auto"]

_LENGTHS = (1, 2, 4, 8, 16)  # few, for on a GPU each has a captured pass of its own
_FIRST = 8
_TIMED = 2  # rounds of each length whose time is taken, behind one in which passes may be compiled and captured
_WORTH = 1.05  # times as fast as now another length must be, for its pass may have to be compiled
_MEMORY = 0.9  # weight of what was seen before, each round


class DraftLength:
    """Tokens to draft in the next round: the same always, or what pays most (`auto`).

    `auto` begins with a few steps with full attention and a few rounds, each of whose tokens counts, and takes their
    times. Then it drafts the length that gives most tokens for its time by the acceptance seen so far; or, where none
    gives more than full attention alone, switches itself off for good.

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
        self._first = min(_FIRST, self.longest)
        self._length = 0 if self.auto else self.longest
        self._latest = self._first  # that was drafted
        self._accepted, self._tested = 0.8, 1.0  # little, until rounds say more
        self._rounds: Counter[int] = Counter()  # of each length; 0 are steps with full attention
        self._out: defaultdict[int, float] = defaultdict(float)  # tokens that came out of them, means over sequences
        self._pass_s: dict[int, float] = {}  # by drafted tokens: the shortest time of a pass, or of a full step
        self._draft_s = float("inf")
        self._off = False

    def __int__(self) -> int:
        """Tokens to draft next; 0 for a decode step with full attention."""
        return self._length

    @property
    def timed(self) -> bool:
        """Whether the time of the next round is wanted: the device is then waited for."""
        return self.auto and 0 < self._rounds[self._length] <= _TIMED

    @property
    def pace(self) -> Pace | None:
        """What `auto` goes by; `None` before it knows."""
        if self._in_trial:
            return None
        length = self._latest if self._latest in self._pass_s else self._first
        return Pace(
            length=self._length,
            drafted=length,
            draft_ms=1000 * self._draft_s,
            pass_ms=1000 * self._pass_s[length],
            full_step_ms=1000 * self._pass_s[0],
            accepted_per_round=self._out[length] / self._rounds[length],
        )

    def saw(self, drafted: int, accepted: list[int], draft_s: float = 0.0, pass_s: float = 0.0) -> None:
        """Learns from a round.

        Args:
            drafted: tokens that each sequence drafted.
            accepted: how many of them each sequence accepted.
            draft_s, pass_s: seconds of drafting and of the pass, or of the step with full attention, if `timed`.
        """
        if not self.auto or drafted != self._length or not accepted:  # the last round may be shorter
            return
        timed = self.timed
        self._rounds[drafted] += 1
        self._out[drafted] += 1 + sum(accepted) / len(accepted)
        if timed:
            self._pass_s[drafted] = min(pass_s, self._pass_s.get(drafted, pass_s))
        if drafted:
            self._latest = drafted
            self._draft_s = min(self._draft_s, draft_s / drafted) if timed else self._draft_s
            tested = sum(min(count + 1, drafted) for count in accepted)  # those behind the first refused one were not
            self._accepted = _MEMORY * self._accepted + sum(accepted) / len(accepted)
            self._tested = _MEMORY * self._tested + tested / len(accepted)
        self._length = self._next()

    @property
    def _in_trial(self) -> bool:
        return any(self._rounds[length] <= _TIMED for length in (0, self._first))

    def _next(self) -> int:
        if self._off:
            return 0
        if self._in_trial:
            return 0 if self._rounds[0] <= _TIMED else self._first
        lengths = {self._first, *(length for length in _LENGTHS if length <= self.longest)}
        best = max(lengths, key=self._tokens_per_second)
        if self._tokens_per_second(best) * self._pass_s[0] <= 1:
            self._off = True
            return 0
        gain = self._tokens_per_second(best) / self._tokens_per_second(self._length)
        return best if gain > _WORTH else self._length

    def _tokens_per_second(self, length: int) -> float:
        """Of each sequence, as far as one can tell: the longer a pass, the longer it takes."""
        rate = min(self._accepted / self._tested, 0.999)
        known = min(self._pass_s.keys() - {0}, key=lambda known: abs(known - length))
        slope = max(0.0, self._pass_s[known] - self._pass_s[0]) / known
        pass_s = max(self._pass_s[known] + slope * (length - known), 1e-9)
        return (1 - rate ** (length + 1)) / (1 - rate) / (length * self._draft_s + pass_s)
