"""What a page says of one file of results: figures, tables, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidaldecode.report.drawing import NARROW, WIDE, Draw, to_svg
from tidaldecode.report.folder import Result
from tidaldecode.report.labels import flattened, written


@dataclass(frozen=True)
class PageFigure:
    """A figure for wide and for narrow windows.

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
    figures: tuple[PageFigure, ...]
    tables: tuple[Table, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)


def drawn(name: str, title: str, description: str, draw: Draw, rows: Any) -> PageFigure | None:
    """A figure drawn twice, so that its letters are as large on a phone as on a desk; `None` of nothing to draw."""
    wide, narrow = (to_svg(draw, rows, width, f"{name}-{size}") for width, size in ((WIDE, "wide"), (NARROW, "narrow")))
    return None if wide is None or narrow is None else PageFigure(name, title, description, wide, narrow)


def article(
    result: Result, title: str, figures: Iterable[PageFigure | None], tables: Iterable[Table], *leave_out: str
) -> Article:
    """A file's article; `leave_out` are the fields that figures and tables tell."""
    facts = {"device": result.devices} | {key: value for key, value in result.fields.items() if key not in leave_out}
    made = {"file": result.file}
    for number, environment in enumerate(result.environments):
        for name, value in environment.items():
            words = ", ".join(f"{one} {of}" for one, of in value.items()) if isinstance(value, dict) else str(value)
            made[f"{name}, run {number + 1}" if len(result.environments) > 1 else name] = words
    return Article(
        title,
        tuple(figure for figure in figures if figure is not None),
        tuple(table for table in tables if table.rows),
        {name: value for name, value in flattened(facts).items() if value not in ("", "–")},
        made,
    )


def model_of(result: Result) -> str:
    """The model's name, or the file's where it names none."""
    return written(result.fields.get("model") or result.file)
