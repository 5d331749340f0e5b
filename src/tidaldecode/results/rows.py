"""Rows of results by method: each field is declared once, for who writes it and for who reads it back."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from tidaldecode.whole_file import whole_file

Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(gt=0, le=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e15, le=1e15)]
Time = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e15)]
Nll = Annotated[float, Field(allow_inf_nan=False, ge=-1, le=500)]  # a certain token rounds to either side of 0
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(max_length=160)]
Budget = Annotated[int, Field(gt=0, le=2**53)] | Annotated[float, Field(gt=0, le=1)] | None
"""Tokens, or a fraction of the context; `None` for full attention."""

Fields = Mapping[str, Any]
"""A row as JSON holds it."""


class Row(BaseModel):
    """A file's rows may have more fields than are declared; the wrong type of one makes the file foreign.

    Who writes a row does not validate it: what was measured is a result, however large.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class MethodSettings(NamedTuple):
    """A method as it was run, its budget aside.

    Attributes:
        method: its name, such as `tidal`.
        plan: of `tidal`.
        selection: of `oracle`.
        page_size: tokens of a page of `quest`.
        full_layers: first layers of a baseline that attend to everything.
        plan_digest: tells plans of one name apart; not part of the label.
    """

    method: str
    plan: str | None = None
    selection: str | None = None
    page_size: int | None = None
    full_layers: int | None = None
    plan_digest: str | None = None

    @classmethod
    def of(cls, row: Fields) -> MethodSettings:
        """The settings of a row, whatever its kind; but for the method's name, a field may be missing."""
        return cls(row["method"], *(row.get(name) for name in cls._fields[1:]))

    @property
    def label(self) -> str:
        """A name for tables and legends: `tidal, smollm2-135m`."""
        parts = [self.method]
        if self.plan is not None:
            parts.append(self.plan)
        if self.selection is not None:
            parts.append(self.selection.replace("_", " "))
        if self.page_size is not None:
            parts.append(f"pages of {self.page_size}")
        if self.full_layers is not None:
            parts.append(f"{self.full_layers} full layer{'' if self.full_layers == 1 else 's'}")
        return ", ".join(parts)


class MethodRow(Row):
    """A row of one method with one budget; but for the last, the fields are those of `MethodSettings`.

    Attributes:
        kv_read_fraction: bytes that a decode step reads of K, V and what the method chooses by, over those of all K and
            V; above 1 where sets of one KV head overlap. `None` in files of earlier versions.
    """

    method: Name
    plan: Name | None = None
    plan_digest: Name | None = None
    budget: Budget
    selection: Name | None = None
    page_size: int | None = None
    full_layers: int | None = None
    kv_read_fraction: Number | None = None

    @property
    def variant(self) -> MethodSettings:
        """The method with its settings, its budget aside."""
        return MethodSettings(*(getattr(self, name) for name in MethodSettings._fields))


def by_method(rows: Iterable[Fields]) -> list[tuple[dict[str, Any], list[Fields]]]:
    """Rows of each method and budget, in the order in which they come first, behind the fields that they share.

    1.0 (the whole context) equals 1 (token) in Python, hence the type in the key.
    """
    groups: dict[tuple[MethodSettings, int | float | None, type], list[Fields]] = {}
    for row in rows:
        groups.setdefault((MethodSettings.of(row), row["budget"], type(row["budget"])), []).append(row)
    return [({**settings._asdict(), "budget": budget}, group) for (settings, budget, _), group in groups.items()]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; `None` of a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def mean_read(rows: Iterable[Fields]) -> float | None:
    """The mean of the rows' `kv_read_fraction`; `None` where one does not say it."""
    shares = [row.get("kv_read_fraction") for row in rows]
    known = [share for share in shares if share is not None]
    return round(statistics.fmean(known), 6) if known and len(known) == len(shares) else None


class SharedRows(NamedTuple):
    """Rows on which methods can be compared: a stopped run, or one with other windows, leaves some methods fewer.

    Attributes:
        rows: those of the windows (or cases) that all methods and budgets have; where they share none, all rows.
        shared: how many windows (cases) all have.
        known: how many any has.
    """

    rows: list[Fields]
    shared: int
    known: int


def shared_rows(rows: Iterable[Fields], key: Sequence[str]) -> SharedRows:
    """The rows of the windows, or cases, that all methods and budgets have.

    Args:
        rows: the cells of `eval ppl` or `eval needle`, all of one file.
        key: names of the fields that tell a window (case) from the others; a field may be missing.
    """

    def case(row: Fields) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in key)

    rows = list(rows)
    cases = [{case(row) for row in group} for _, group in by_method(rows)]
    shared = set.intersection(*cases) if cases else set()
    return SharedRows([row for row in rows if case(row) in shared] if shared else rows, len(shared),
                      len(set().union(*cases)))  # fmt: skip


def budgets_of(rows: Iterable[MethodRow]) -> list[int | float]:
    """The budgets of rows, from the smallest to the largest, tokens before fractions."""
    budgets = {(isinstance(row.budget, float), row.budget) for row in rows if row.budget is not None}
    return [budget for _, budget in sorted(budgets)]


def save_results(results: dict[str, Any], path: Path) -> None:
    """Writes results as JSON, a line for each field and each row; an existing file stays whole until all is written."""
    fields = ",\n".join(f"  {json.dumps(key)}: {_lines(value)}" for key, value in results.items())
    with whole_file(path) as temporary:
        temporary.write_text("{\n" + fields + "\n}\n", encoding="utf-8")


def _lines(value: Any) -> str:
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], dict):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
