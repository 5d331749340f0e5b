"""The rows of the study of cache correction and lossless decoding, from its cells; loads no framework."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidaldecode.errors import InputError

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class CorrectionRow:
    """One way to decode over all windows.

    Attributes:
        mode: full attention (`full`); the plan alone (`plain`); with correction; lossless.
        length: tokens between two passes with full attention; `None` for `full` and `plain`.
        gap: nats per token above full attention, the given text decoded (teacher-forced); 0 for lossless decoding,
            whose tokens are full attention's.
        ms_per_token: median over the windows of the milliseconds per token of greedy decoding.
        speedup: of full attention's time in the same windows over this one's.
        accepted_per_round: tokens out of a round; `None` but for `lossless`.
        differing: windows in which a lossless text is not full attention's, token for token.
        gap_stderr: standard error of the mean of `gap` over the windows; `None` of a single window.
        plan: its name; `None` for `full`.
    """

    mode: str
    length: int | None
    budget: int | float | None
    gap: float
    ms_per_token: float
    speedup: float
    accepted_per_round: float | None
    differing: int | None
    windows: int
    gap_stderr: float | None = None
    plan: str | None = None


def row_of(pairs: Sequence[tuple[Cell, Cell]]) -> CorrectionRow:
    """The row of one variant from its cells, each with full attention's of the same window."""
    first = pairs[0][0]
    gaps = [mine["nll"] - base["nll"] for mine, base in pairs]
    accepted = [mine["accepted_per_round"] for mine, _ in pairs if mine["mode"] == "lossless"]
    ms, full_ms = (statistics.median(cell["ms_per_token"] for cell in column) for column in zip(*pairs, strict=True))
    return CorrectionRow(
        mode=first["mode"],
        length=first["length"],
        budget=first["budget"],
        gap=statistics.fmean(gaps),
        ms_per_token=round(ms, 3),
        speedup=round(full_ms / ms, 4),
        accepted_per_round=round(statistics.fmean(accepted), 4) if accepted else None,
        differing=sum(mine["first_difference"] is not None for mine, _ in pairs) if accepted else None,
        windows=len(pairs),
        plan=None if first["mode"] == "full" else first.get("plan"),
        gap_stderr=statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
    )


def rows_of(cells: Sequence[Cell]) -> list[CorrectionRow]:
    """A row for each variant, from the windows that all variants share.

    Raises:
        InputError: there is no such window.
    """
    variants: dict[tuple[Any, ...], dict[int, Cell]] = {}
    for cell in cells:
        key = cell["mode"], cell["length"], cell["budget"], cell.get("plan")
        variants.setdefault(key, {})[cell["window"]] = cell
    full = next((found for key, found in variants.items() if key[0] == "full"), {})
    shared = [window for window in full if all(window in found for found in variants.values())]
    if not shared:
        raise InputError("no window was decoded in every way yet")
    return [row_of([(found[window], full[window]) for window in shared]) for found in variants.values()]
