"""What a page says of one file of results: numbers first, then figures and tables, then how it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidaldecode.report.drawing import NARROW, WIDE, Drawing, to_svg
from tidaldecode.report.results import Result

_LONGEST = 160  # characters of a value
_MOST = 8  # items of a list


@dataclass(frozen=True)
class Card:
    """A few headline numbers of one kind.

    Attributes:
        subject: of what model or shape.
        values: each number, and what it is at (a budget, a context).
        at: what the second of the values are.
        note: a sentence.
    """

    heading: str
    subject: str
    values: tuple[tuple[str, str], ...]
    at: str
    note: str


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
    """Rows of text below their columns' names.

    Attributes:
        folded: shown when asked for.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column but the first, whether it holds numbers, which are set flush right."""
        columns = list(zip(*self.rows, strict=True))[1:]
        return (False, *(all(re.match(r"[+−-]?[\d.]|–?$", cell) for cell in column) for column in columns))


@dataclass(frozen=True)
class Article:
    """One file of results.

    Attributes:
        facts: what it was measured with, names and values.
        environments: command, device and versions of each run, names and values.
    """

    title: str
    file: str
    facts: tuple[tuple[str, str], ...] = ()
    cards: tuple[Card, ...] = ()
    figures: tuple[PageFigure, ...] = ()
    tables: tuple[Table, ...] = ()
    environments: tuple[tuple[tuple[str, str], ...], ...] = ()


def page_figure(name: str, title: str, description: str, draw: Drawing) -> PageFigure:
    """Draws a figure twice, so that its letters are as large on a phone as on a desk."""
    wide, narrow = (to_svg(draw, width, f"{name}-{size}") for size, width in (("wide", WIDE), ("narrow", NARROW)))
    return PageFigure(name, title, description, wide, narrow)


def model_of(result: Result) -> str:
    """The model's name, or the file's where it names none."""
    return written(result.fields.get("model") or result.file)


def devices_of(result: Result) -> str:
    """On what it was measured."""
    return " and ".join(dict.fromkeys(str(made["device"]) for made in result.environments if made.get("device")))


def facts_of(result: Result, *leave_out: str) -> tuple[tuple[str, str], ...]:
    """The device, and the fields of a file that are one value."""
    fields = {"device": devices_of(result)} | result.fields
    return tuple(
        (name.replace("_", " "), written(value))
        for name, value in fields.items()
        if name not in leave_out and isinstance(value, str | int | float) and value != ""
    )


def environments_of(result: Result) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Every run that wrote the file."""
    return tuple(
        tuple((name, _versions(value) if isinstance(value, dict) else str(value)) for name, value in made.items())
        for made in result.environments
    )


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def flattened(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values, those of objects in objects with both names: `full.decode_ms_per_token`."""
    found = []
    for name, value in fields.items():
        if isinstance(value, dict):
            found += flattened(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, written(value)))
    return found


def written(value: Any) -> str:
    """A value for a table: whole where it is short."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e6 <= abs(value) < 1e15 else f"{value:,.6g}"
    if isinstance(value, list):
        return _listed(value)
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _listed(values: Sequence[Any]) -> str:
    if len(values) > _MOST or any(isinstance(value, list | dict) for value in values):
        return f"{len(values)} values"
    return ", ".join(written(value) for value in values)
