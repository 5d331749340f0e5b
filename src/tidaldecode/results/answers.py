"""The rows of `eval answers`: a cell for each question and method, and their summary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from tidaldecode.results.rows import (
    Count,
    Fields,
    MethodRow,
    MethodSettings,
    Name,
    Nll,
    Number,
    Positive,
    Share,
    by_method,
    mean_and_error,
)

OTHER_SEED = "full, another seed"
"""What full attention's second answer is called: the floor of all measures."""


class AnswerCell(MethodRow):
    """An answer to one question by one method.

    Attributes:
        draw: 0, or 1 of full attention's answer at another seed.
        asked, references, task: of the question.
        prompt_digest: tells its prompt, in tokens, from others.
        cut: whether the document lost something.
        text, token_ids: the answer; the end of sequence is one of its tokens, and not in the text.
        ended: whether it came to an end by itself.
        nll: nats per token that the answer has by full attention.
        full_nll: the same of full attention's own answer.
        repetition: share of its runs of 8 tokens that came before in it.
        loops: whether it ends in a stretch said three times or more in a row.
        rouge_l, f1: of words, against full attention's answer; `reference_...`: against the nearest reference.
        kv_read_fraction: the mean over its decode steps.
    """

    question: Name
    draw: Count
    asked: str
    references: Annotated[tuple[str, ...], Field(strict=False)]  # JSON has lists
    task: Name | None
    prompt_digest: Name
    prompt_tokens: Positive
    cut: bool
    text: str
    token_ids: Annotated[tuple[int, ...], Field(strict=False)]
    tokens: Positive
    ended: bool
    nll: Nll
    full_nll: Nll
    repetition: Share
    loops: bool
    rouge_l: Share
    f1: Share
    reference_rouge_l: Share | None
    reference_f1: Share | None
    kv_read_fraction: Number
    seconds: Number | None = None


def who_wrote(cell: Fields) -> str:
    """The method of an answer, budget aside."""
    return OTHER_SEED if cell["draw"] else MethodSettings.of(cell).label


class Mean(NamedTuple):
    """A mean over questions, and its standard error; `None` of one question."""

    value: float
    error: float | None


_MEANS = (
    "nll", "repetition", "rouge_l", "f1", "reference_rouge_l", "reference_f1", "tokens", "kv_read_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class AnswerSummary:
    """All answers by one method; each question counts the same.

    Attributes:
        method: its settings and budget.
        draw: see `AnswerCell`.
        questions: how many; `loops` and `ended` are of them.
        means: by name; `surprise` is what full attention's log probability of its own answer is above that of the
            method's, nats per token. `None` where nothing is known.
        cells: question by question.
    """

    method: Fields
    draw: int
    questions: int
    loops: int
    ended: int
    means: dict[str, Mean | None]
    cells: tuple[Fields, ...]

    @classmethod
    def of(cls, method: Fields, draw: int, cells: list[Fields]) -> AnswerSummary:
        """The summary of a method's cells."""
        means: dict[str, Mean | None] = {
            "surprise": Mean(*mean_and_error([cell["nll"] - cell["full_nll"] for cell in cells]))
        }
        for name in _MEANS:
            known = [float(value) for cell in cells if (value := cell.get(name)) is not None]
            means[name] = Mean(*mean_and_error(known)) if known else None
        loops, ended = (sum(cell[name] for cell in cells) for name in ("loops", "ended"))
        return cls(method, draw, len(cells), loops, ended, means, tuple(cells))

    @property
    def label(self) -> str:
        """Who wrote them, budget aside."""
        return who_wrote({**self.method, "draw": self.draw})

    def to_json(self) -> dict[str, Any]:
        """One flat object; standard errors are `..._stderr`."""
        means = {name: mean and mean.value for name, mean in self.means.items()}
        errors = {f"{name}_stderr": mean and mean.error for name, mean in self.means.items()}
        counts = {name: getattr(self, name) for name in ("draw", "questions", "loops", "ended")}
        return {**self.method, **counts, **means, **errors}


def answer_summary(cells: Iterable[Fields]) -> list[AnswerSummary]:
    """The answers of each method and budget: full attention's, its own at another seed, then the others."""
    cells = list(cells)
    first, second = (by_method(cell for cell in cells if cell["draw"] == draw) for draw in (0, 1))
    found = [AnswerSummary.of(method, 0, group) for method, group in first]
    floor = [AnswerSummary.of(method, 1, group) for method, group in second]
    return [*found[:1], *floor, *found[1:]]


def nll_over_floor(summary: AnswerSummary, summaries: Iterable[AnswerSummary]) -> float | None:
    """Nats per token of a method's answers over those of full attention's at another seed, where there are such."""
    floor = next((other.means["nll"] for other in summaries if other.draw), None)
    own = summary.means["nll"]
    return own.value / floor.value if own and floor and floor.value > 0 else None
