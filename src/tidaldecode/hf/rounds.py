"""What the rounds of a lossless generation drafted and accepted, and how long they took."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Pace:
    """What `lossless="auto"` measured, and what it did about it.

    Attributes:
        length: tokens that it drafts in a round; 0 where it goes on with full attention alone.
        drafted: tokens that were drafted in the rounds that the figures are of.
        draft_ms: milliseconds of a draft step.
        pass_ms: milliseconds of the pass that verifies `drafted` tokens.
        full_step_ms: milliseconds of a decode step with full attention.
        accepted_per_round: tokens that come out of such a round, full attention's own included.
    """

    length: int
    drafted: int
    draft_ms: float
    pass_ms: float
    full_step_ms: float
    accepted_per_round: float

    @property
    def speedup(self) -> float:
        """Of full attention's time for the tokens of a round over the round's."""
        return self.accepted_per_round * self.full_step_ms / (self.drafted * self.draft_ms + self.pass_ms)

    def to_json(self) -> dict[str, float]:
        """The figures as results hold them."""
        return {name: round(value, 4) for name, value in {**asdict(self), "speedup": self.speedup}.items()}

    def __str__(self) -> str:
        does = f"drafts {self.length} tokens a round" if self.length else "switched itself off"
        return (
            f"lossless auto {does}: {self.drafted} draft steps of {self.draft_ms:.2f} ms and a pass of "
            f"{self.pass_ms:.2f} ms give {self.accepted_per_round:.2f} tokens, "
            f"{self.speedup:.2f} times as fast as full steps of {self.full_step_ms:.2f} ms"
        )


@dataclass
class Rounds:
    """What the rounds of one lossless generation drafted and accepted.

    Attributes:
        drafted: tokens that each round drafted for each sequence.
        sequences: sequences that each round was for: those that were not done.
        tokens: tokens that came out of each round, of all these sequences together; in a sequence's last round also
            those behind its end of sequence, which nobody sees.
        pace: of `lossless="auto"`, what it went by at the end; `None` else, and where too few tokens came to tell.
    """

    drafted: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pace: Pace | None = None

    def add(self, drafted: int, tokens: list[int]) -> None:
        """Records a round and the tokens that came out of it for each sequence that was not done."""
        self.drafted.append(drafted)
        self.sequences.append(len(tokens))
        self.tokens.append(sum(tokens))

    @property
    def accepted_per_round(self) -> float | None:
        """Tokens that came out of a round for a sequence, the one of full attention's own included; the mean.

        Of rounds that drafted: a step with full attention is none. `None` where no round did.
        """
        rounds = zip(self.drafted, self.sequences, self.tokens, strict=True)
        drafted = [(sequences, tokens) for drafts, sequences, tokens in rounds if drafts]
        sequences, tokens = map(sum, zip(*drafted, strict=True)) if drafted else (0, 0)
        return tokens / sequences if sequences else None
