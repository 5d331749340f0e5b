"""What the cells of an evaluation say together: one line for each method and budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A method as it was run, its budget aside.

    Attributes:
        method: `full`, `tidal`, `quest`, `streaming` or `oracle`.
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


@dataclass(frozen=True)
class PplSummary:
    """Perplexity of a method over all windows; each window counts the same.

    Attributes:
        budget: tokens, or a fraction of the context; `None` for full attention.
        windows: how many there were.
        tokens: decoded tokens of all windows.
        nll: mean negative log-likelihood, nats per token.
        full_nll: full attention's, on the same windows.
        gap: `nll - full_nll`.
        gap_stderr: standard error of the gap over windows; `None` of one window.
        nll_by_position: [bins], mean over windows; bin `i` begins at position `first_position + i * bin_tokens`.
        first_position: tokens before the first decoded one.
        bin_tokens: positions of a bin (the last may have fewer).
    """

    variant: Variant
    budget: int | float | None
    windows: int
    tokens: int
    nll: float
    full_nll: float
    gap: float
    gap_stderr: float | None
    nll_by_position: tuple[float, ...]
    first_position: int
    bin_tokens: int


@dataclass(frozen=True)
class NeedleCell:
    """Needles of one length and depth.

    Attributes:
        depth: where the needle lies, 0 (start) to 1 (end).
    """

    length: int
    depth: float
    correct: int
    total: int


@dataclass(frozen=True)
class NeedleSummary:
    """Needles found by a method.

    Attributes:
        budget: tokens, or a fraction of the context; `None` for full attention.
        cells: one for each length and depth, sorted.
    """

    variant: Variant
    budget: int | float | None
    cells: tuple[NeedleCell, ...]

    @property
    def correct(self) -> int:
        """Needles found."""
        return sum(cell.correct for cell in self.cells)

    @property
    def total(self) -> int:
        """Needles hidden."""
        return sum(cell.total for cell in self.cells)

    @property
    def accuracy(self) -> float:
        """Share of the needles that were found, 0 to 1."""
        return self.correct / self.total

    def of_length(self, length: int) -> tuple[int, int]:
        """Needles found and hidden in prompts of a length."""
        cells = [cell for cell in self.cells if cell.length == length]
        return sum(cell.correct for cell in cells), sum(cell.total for cell in cells)


@dataclass(frozen=True)
class TaskScore:
    """One metric of an lm-eval task, by one method.

    Attributes:
        budget: tokens, or a fraction of the context; `None` for full attention.
        metric: lm-eval's name of it, such as `acc,none`.
        stderr: standard error, `None` where lm-eval gives none.
        samples: documents of the task.
    """

    variant: Variant
    budget: int | float | None
    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


@dataclass(frozen=True)
class SharedRows:
    """Rows on which methods can be compared: a stopped run, or one with other windows, leaves some methods fewer.

    Attributes:
        rows: those of the windows (or cases) that all methods and budgets have; where they share none, all rows.
        shared: how many windows (cases) all have.
        known: how many any has.
    """

    rows: list[Row]
    shared: int
    known: int


def shared_rows(rows: Iterable[Row], key: Sequence[str]) -> SharedRows:
    """The rows of the windows, or cases, that all methods and budgets have.

    Args:
        rows: the cells of `eval ppl` or `eval needle`, all of one file.
        key: names of the fields that tell a window (case) from the others; a field may be missing.
    """
    rows = list(rows)
    cases = [{_case(row, key) for row in group} for _, _, group in _groups(rows)]
    shared = set.intersection(*cases) if cases else set()
    return SharedRows(
        rows=[row for row in rows if _case(row, key) in shared] if shared else rows,
        shared=len(shared),
        known=len(set().union(*cases)),
    )


def budgets_of(summaries: Iterable[PplSummary | NeedleSummary]) -> list[int | float]:
    """The budgets of summaries, from the smallest to the largest, tokens before fractions."""
    budgets = {(isinstance(s.budget, float), s.budget) for s in summaries if s.budget is not None}
    return [budget for _, budget in sorted(budgets)]


def variant_of(row: Row) -> Variant:
    """The variant that a row is of, whatever its kind."""
    names = ("plan", "selection", "page_size", "full_layers", "plan_digest")
    return Variant(row["method"], **{name: row.get(name) for name in names})


def ppl_summary(rows: Iterable[Row]) -> list[PplSummary]:
    """Perplexity for each method and budget, in the order in which they come first.

    Args:
        rows: the cells of `eval ppl`, one for each window, method and budget, all of one file: windows of one length,
            decoded from one position.
    """
    return [_ppl_of(variant, budget, group) for variant, budget, group in _groups(rows)]


def ppl_summary_of(row: Row) -> PplSummary:
    """The summary that a row of the `--json` object of `eval ppl` was."""
    values = {field.name: row[field.name] for field in fields(PplSummary) if field.name != "variant"}
    return PplSummary(variant_of(row), **values | {"nll_by_position": tuple(row["nll_by_position"])})


def needle_summary(rows: Iterable[Row]) -> list[NeedleSummary]:
    """Needles found by each method at each budget, in the order in which they come first.

    Args:
        rows: the cells of `eval needle`; several of one length and depth are added up.
    """
    return [NeedleSummary(variant, budget, _needle_cells(group)) for variant, budget, group in _groups(rows)]


def lm_eval_summary(rows: Iterable[Row]) -> list[TaskScore]:
    """Every metric of every task, method and budget, standard errors beside what they are of.

    Args:
        rows: the cells of `eval lm-eval`, one for each task, method and budget.
    """
    return [
        TaskScore(variant_of(row), row["budget"], row["task"], metric, value, _stderr_of(metric, row), row["samples"])
        for row in rows
        for metric, value in row["metrics"].items()
        if isinstance(value, int | float) and "_stderr" not in metric
    ]


def _stderr_of(metric: str, row: Row) -> float | None:
    """`acc,none` has its standard error in `acc_stderr,none`; where lm-eval has none it says "N/A"."""
    name, comma, filter_name = metric.partition(",")
    value = row["metrics"].get(f"{name}_stderr{comma}{filter_name}")
    return value if isinstance(value, int | float) else None


def _case(row: Row, key: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in key)


def _groups(rows: Iterable[Row]) -> list[tuple[Variant, int | float | None, list[Row]]]:
    """Rows by variant and budget. 1.0 (the whole context) equals 1 (token) in Python, hence the type in the key."""
    groups: dict[tuple[Variant, int | float | None, type], list[Row]] = {}
    for row in rows:
        groups.setdefault((variant_of(row), row["budget"], type(row["budget"])), []).append(row)
    return [(variant, budget, group) for (variant, budget, _), group in groups.items()]


def _ppl_of(variant: Variant, budget: int | float | None, rows: Sequence[Row]) -> PplSummary:
    gaps = [row["nll"] - row["full_nll"] for row in rows]
    return PplSummary(
        variant=variant,
        budget=budget,
        windows=len(rows),
        tokens=sum(row["tokens"] for row in rows),
        nll=statistics.fmean(row["nll"] for row in rows),
        full_nll=statistics.fmean(row["full_nll"] for row in rows),
        gap=statistics.fmean(gaps),
        gap_stderr=statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None,
        nll_by_position=tuple(
            statistics.fmean(values) for values in zip(*(row["nll_by_position"] for row in rows), strict=True)
        ),
        first_position=rows[0]["first_position"],
        bin_tokens=rows[0]["bin_tokens"],
    )


def _needle_cells(rows: Iterable[Row]) -> tuple[NeedleCell, ...]:
    found: dict[tuple[int, float], list[int]] = {}
    for row in rows:
        counts = found.setdefault((row["length"], row["depth"]), [0, 0])
        counts[0] += row["correct"]
        counts[1] += row["total"]
    return tuple(NeedleCell(length, depth, *counts) for (length, depth), counts in sorted(found.items()))
