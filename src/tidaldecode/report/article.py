"""What a page says of one file of results, or of several: figures, tables, and how it was made."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidaldecode.report.drawing import NARROW, WIDE, Draw, to_svg
from tidaldecode.report.folder import Result
from tidaldecode.report.labels import budget_label, flattened, percent, ratio, written


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "budget": ("budget", lambda budget: budget_label(budget) or "–"),
    "share": ("K and V read", percent),
    "kv_read_fraction": ("K and V read", percent),
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
    "prefill": ("prefill, s", _seconds),
    "all": ("all, s", _seconds),
    "decode_ms_per_token": ("ms per token", lambda ms: "–" if ms is None else f"{ms:,.3f}"),
    "decode_speedup_vs_full": ("speed-up, decoding", ratio),
    "peak_memory_gib": ("peak GiB", written),
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
class Texts:
    """Texts to be read side by side, by what they are; folded."""

    title: str
    texts: dict[str, str]


@dataclass(frozen=True)
class Article:
    """One file of results, or a comparison of several.

    Attributes:
        facts: what it was measured with.
        made: file, and command, device and versions of each run.
        texts: what was written.
    """

    title: str
    figures: Sequence[PageFigure]
    tables: Sequence[Table]
    facts: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[Texts] = ()


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
        title, description, *_ = (inspect.getdoc(draw) or "").split("\n\n")
        name = f"{prefix}{draw.__name__.replace('_', '-')}"
        wide, narrow = (to_svg(draw, rows, inches, f"{name}-{inches:.0f}") for inches in (WIDE, NARROW))
        if wide:
            found.append(PageFigure(name, title.rstrip("."), " ".join(description.split()) + note, wide, narrow))
    return found
