"""What a page says of one file of results, or of several: figures, tables, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidaldecode.report import losses, scores, speeds
from tidaldecode.report.drawing import NARROW, WIDE, Draw, to_svg
from tidaldecode.report.folder import Result
from tidaldecode.report.labels import budget_label, flattened, percent, ratio, written

_CAPTIONS: dict[Draw, tuple[str, str, str]] = {
    losses.loss_over_share: (
        "loss",
        "Loss over what is read",
        "Nats per token above full attention over the share of K and V that a decode step reads: the lower left is "
        "better. Both scales are logarithmic, that of losses linear near 0. The oracle, dashed, reads the best tokens "
        "that scores can choose and saves no time: it is the floor. Bars are one standard error over windows.",
    ),
    speeds.speed_ups: (
        "speed",
        "Speed over context",
        "How many times as fast as full attention, the dashed line, a decode step is: whole steps of a model, from a "
        "token to the next, or the attention in them alone, by batch.",
    ),
    losses.loss_over_budget: (
        "budgets",
        "Gap to full attention at each token budget",
        "Nats per token above full attention, which is the dashed line; bars are one standard error over windows.",
    ),
    losses.perplexity_over_position: (
        "position",
        "Perplexity over position",
        "Perplexity of the decoded tokens by their position in the context, one panel for each budget.",
    ),
    losses.correction_panels: (
        "correction",
        "Tokens between two passes with full attention",
        "Nats per token above full attention, milliseconds per token, and tokens that come out of a round of lossless "
        "decoding; one colour a budget, lossless decoding dashed. Bars are one standard error over windows.",
    ),
    losses.frontier: (
        "frontier",
        "Loss over cost",
        "The best plans found: nats per token over the share of K and V that a step reads. Numbers at the points are "
        "full and select layers; bars are one standard error over windows.",
    ),
    scores.needle_heatmaps: (
        "needles",
        "Share of the needles found",
        "One panel for each method and budget; columns are prompt lengths, rows the depth at which the needle lies. "
        "1 is every needle, 0 none.",
    ),
    scores.task_scores: (
        "tasks",
        "Score of each task",
        "One point for each method and budget; bars are one standard error over the task's documents.",
    ),
    scores.recall_heatmaps: (
        "recall",
        "Recall between layers",
        "Share of the column layer’s attention that the row layer’s choice of tokens covers, 0 to 1.",
    ),
    scores.recall_over_distance: (
        "distance",
        "Recall over distance",
        "The mean over all pairs of layers so far apart.",
    ),
    speeds.step_times: (
        "steps",
        "Time of a decode step",
        "Milliseconds from a token to the next over the context, a line for each method and budget; dashed: the time "
        "in which the bytes that the method needs can be read.",
    ),
    speeds.operation_times: (
        "operations",
        "Time of a step’s attention, and of one layer’s operations",
        "Microseconds over the context, a line for each method or operation and budget; both scales are logarithmic.",
    ),
}
"""Of each figure the end of its id, its title, and what it shows."""

_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "budget": ("budget", lambda budget: budget_label(budget) or "–"),
    "share": ("K and V read", percent),
    "plan_share": ("the plan reads", percent),
    "nll": ("nats per token", "{:.4f}".format),
    "full_nll": ("full attention", "{:.4f}".format),
    "perplexity": ("perplexity", "{:,.2f}".format),
    "mode": ("", str),
    "length": ("T", written),
    "gap": ("gap, nats per token", str),
    "ms_per_token": ("ms per token", "{:,.2f}".format),
    "speedup": ("speed-up", ratio),
    "accepted_per_round": ("tokens per round", lambda tokens: "–" if tokens is None else f"{tokens:.2f}"),
    "differing": ("other texts", written),
    "step_ms": ("ms per token", "{:,.3f}".format),
    "floor_ms": ("floor", "{:,.3f}".format),
    "us": ("µs", "{:,.1f}".format),
    "floor_us": ("floor", "{:,.1f}".format),
    "over_sdpa": ("over SDPA", ratio),
    "speedup_vs_full": ("speed-up", ratio),
}
"""Names of columns, and how their values are written, where a field's own name and value do not do."""

Figures = Mapping[Draw, Any]
"""What draws them, and the rows that it draws."""


@dataclass(frozen=True)
class PageFigure:
    """A figure drawn twice, so that its letters are as large on a phone as on a desk.

    Attributes:
        name: its id on the page.
        description: what it shows, for those who do not see it and for the caption.
    """

    name: str
    title: str
    description: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Table:
    """Rows of text by the names of their columns.

    Attributes:
        rows: cells by column; a line break parts what is told small below a cell.
        folded: shown when asked for.
    """

    title: str
    rows: Sequence[Mapping[str, str]]
    folded: bool = False

    @classmethod
    def of(cls, title: str, rows: Iterable[Mapping[str, Any]], fields: str, folded: bool = False) -> Table:
        """A table of fields of rows, their names with spaces between."""
        columns = {name: _COLUMNS.get(name, (name.replace("_", " "), written)) for name in fields.split()}
        return cls(title, [{head: write(row[name]) for name, (head, write) in columns.items()} for row in rows], folded)

    @property
    def columns(self) -> dict[str, bool]:
        """For each column whether it holds numbers, which are set flush right; the first one tells of what."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        numbers = [all(re.match(r"[+−-]?[\d.]|–?$", row.get(name, "–")) for row in self.rows) for name in names]
        return {name: index > 0 and number for index, (name, number) in enumerate(zip(names, numbers, strict=True))}


@dataclass(frozen=True)
class Article:
    """One file of results, or a comparison of several.

    Attributes:
        facts: what it was measured with.
        made: file, and command, device and versions of each run.
    """

    title: str
    figures: Sequence[PageFigure]
    tables: Sequence[Table]
    facts: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)


def article(
    result: Result, title: str, figures: Sequence[PageFigure], tables: Iterable[Table], *leave_out: str
) -> Article:
    """A file's article; `leave_out` are the fields that figures and tables tell."""
    facts = {"device": result.devices} | {key: value for key, value in result.fields.items() if key not in leave_out}
    made = {"file": result.file}
    for number, environment in enumerate(result.environments, 1):
        for name, value in environment.items():
            words = ", ".join(f"{one} {of}" for one, of in value.items()) if isinstance(value, dict) else str(value)
            made[f"{name}, run {number}" if len(result.environments) > 1 else name] = words
    known = {name: value for name, value in flattened(facts).items() if value not in ("", "–")}
    return Article(title, figures, [table for table in tables if table.rows], known, made)


def drawn(prefix: str, figures: Figures, note: str = "") -> list[PageFigure]:
    """Figures of rows, those that have something to draw.

    Args:
        prefix: of their ids on the page.
        note: what is said behind each description.
    """
    found = []
    for draw, rows in figures.items():
        suffix, title, description = _CAPTIONS[draw]
        name = f"{prefix}{suffix}"
        wide, narrow = (to_svg(draw, rows, inches, f"{name}-{inches:.0f}") for inches in (WIDE, NARROW))
        if wide is not None and narrow is not None:
            found.append(PageFigure(name, title, description + note, wide, narrow))
    return found
