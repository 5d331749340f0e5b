"""The rows of `eval correction`: a cell for each window and way to decode, and their summary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tidaldecode.errors import InputError
from tidaldecode.results.rows import (
    Budget,
    Count,
    Fields,
    MethodRow,
    Name,
    Nll,
    Number,
    Positive,
    Row,
    Time,
    mean_and_error,
    mean_read,
)

Mode = Literal["full", "plain", "correction", "lossless"]
"""Full attention; the plan alone; with correction; lossless."""


class CorrectionCell(MethodRow):
    """One window by one way to decode.

    Attributes:
        window: its first token's place in the text.
        length: tokens between two passes with full attention; `None` for `full` and `plain`.
        nll: nats per token of the given text (teacher-forced); of lossless decoding full attention's.
        ms_per_token: milliseconds per token of greedy decoding.
        token_ids: what it said.
        accepted_per_round: tokens out of a round of lossless decoding.
        first_difference: index of the first token in which it is not full attention's text; `None` if it is.
    """

    window: Count
    mode: Mode
    length: Positive | None
    nll: Nll
    ms_per_token: Time
    token_ids: Annotated[tuple[int, ...], Field(strict=False)] = ()  # JSON has lists
    accepted_per_round: Number | None = None
    first_difference: Count | None = None


class CorrectionRow(Row):
    """One way to decode over all windows.

    Attributes:
        length: tokens between two passes with full attention; `None` for `full` and `plain`.
        gap: nats per token above full attention, the given text decoded (teacher-forced); 0 for lossless decoding,
            whose tokens are full attention's.
        ms_per_token: median over the windows of the milliseconds per token of greedy decoding.
        speedup: of full attention's time in the same windows over this one's.
        accepted_per_round: tokens out of a round; `None` but for `lossless`.
        differing: windows in which a lossless text is not full attention's, token for token.
        gap_stderr: standard error of the mean of `gap` over the windows; `None` of a single window.
        plan: its name; `None` for `full`.
        kv_read_fraction: share of K and V read per new token, passes with full attention included; `None` in files of
            earlier versions.
    """

    mode: Mode
    length: Positive | None
    budget: Budget
    gap: Number
    ms_per_token: Time
    speedup: Number
    accepted_per_round: Number | None
    differing: Count | None
    windows: Positive
    gap_stderr: Number | None = None
    plan: Name | None = None
    kv_read_fraction: Number | None = None


def rows_of(cells: Sequence[Fields]) -> list[CorrectionRow]:
    """A row for each way to decode, from the windows that all of them share.

    Raises:
        InputError: there is no such window.
    """
    ways: dict[tuple[Any, ...], dict[int, Fields]] = {}
    for cell in cells:
        key = cell["mode"], cell["length"], cell["budget"], cell.get("plan")
        ways.setdefault(key, {})[cell["window"]] = cell
    full = next((found for key, found in ways.items() if key[0] == "full"), {})
    shared = [window for window in full if all(window in found for found in ways.values())]
    if not shared:
        raise InputError("no window was decoded in every way yet")
    return [_row_of([(found[window], full[window]) for window in shared]) for found in ways.values()]


def _row_of(pairs: Sequence[tuple[Fields, Fields]]) -> CorrectionRow:
    """The row of one way from its cells, each with full attention's of the same window."""
    first = pairs[0][0]
    gap, error = mean_and_error([mine["nll"] - base["nll"] for mine, base in pairs])
    accepted = [mine["accepted_per_round"] for mine, _ in pairs if mine["mode"] == "lossless"]
    ms, full_ms = (statistics.median(cell["ms_per_token"] for cell in column) for column in zip(*pairs, strict=True))
    return CorrectionRow.model_construct(
        mode=first["mode"],
        length=first["length"],
        budget=first["budget"],
        gap=gap,
        ms_per_token=round(ms, 3),
        speedup=round(full_ms / ms, 4),
        accepted_per_round=round(statistics.fmean(accepted), 4) if accepted else None,
        differing=sum(mine["first_difference"] is not None for mine, _ in pairs) if accepted else None,
        windows=len(pairs),
        plan=None if first["mode"] == "full" else first.get("plan"),
        gap_stderr=error,
        kv_read_fraction=mean_read([mine for mine, _ in pairs]),
    )
