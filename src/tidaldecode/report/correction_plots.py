"""Figures of cache correction and lossless decoding, from the rows of `eval correction`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tidaldecode.report.drawing import MUTED, add_legend, line_styles, new_figure, save_png
from tidaldecode.report.labels import budget_label
from tidaldecode.results.correction import CorrectionRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_correction(rows: Sequence[CorrectionRow], path: Path, title: str) -> None:
    """Writes `correction_panels` as a PNG file."""
    save_png(partial(correction_panels, rows), path, title)


def correction_panels(rows: Sequence[CorrectionRow], width: float) -> Figure:
    """Gap, milliseconds per token and tokens per round against the tokens between two full passes.

    The gap of a few windows may be below 0; bars are its standard errors.

    Args:
        rows: of `tidaldecode.evaluate.correction.study`; one plan and budget a colour, lossless decoding dashed.
        width: inches.
    """
    figure = new_figure(width, 3.4 if width > 5 else 8)
    axes = list(figure.subplots(1, 3).flat) if width > 5 else list(figure.subplots(3, 1).flat)
    lengths: Sequence[int | None] = sorted({row.length for row in rows if row.length is not None})
    ways = list(dict.fromkeys((row.plan, row.budget) for row in rows if row.mode != "full"))
    several = len({plan for plan, _ in ways}) > 1
    places = {length: place for place, length in enumerate([*lengths, None])}
    styles = line_styles(["tidal", *["spare"] * (len(ways) - 1)])
    for (plan, budget), style in zip(ways, styles, strict=True):
        own = [row for row in rows if (row.plan, row.budget) == (plan, budget)]
        name = f"{plan}, budget {budget_label(budget)}" if several else f"budget {budget_label(budget)}"
        corrected = [row for row in own if row.mode in ("correction", "plain")]
        lossless = [row for row in own if row.mode == "lossless"]
        for axis, field in ((axes[0], "gap"), (axes[1], "ms_per_token")):
            _line(axis, corrected, field, places, color=style.color, marker=style.marker, label=f"{name}, correction")
        for axis, field in ((axes[1], "ms_per_token"), (axes[2], "accepted_per_round")):
            _line(axis, lossless, field, places, color=style.color, marker=style.marker, linestyle="--",
                  label=f"{name}, lossless")  # fmt: skip
    _full_attention(axes, rows, places)
    for axis, title in zip(axes, ("nats per token above full", "ms per token", "tokens out per round"), strict=True):
        names = ["none" if length is None else str(length) for length in places]
        axis.set_xticks(list(places.values()), names)
        axis.set(title=title, xlabel="tokens between full passes", ylim=(min(0, axis.get_ylim()[0]), None))
    axes[2].set_xlim(axes[0].get_xlim())
    add_legend(figure, width)
    return figure


def _line(axis: Axes, rows: Sequence[CorrectionRow], field: str, places: dict[int | None, int], **style: str) -> None:
    rows = sorted(rows, key=lambda row: places[row.length])
    where, values = [places[row.length] for row in rows], [getattr(row, field) for row in rows]
    errors = [row.gap_stderr or 0.0 for row in rows] if field == "gap" else None
    axis.errorbar(where, values, yerr=errors, elinewidth=1, **style)  # type: ignore[arg-type]


def _full_attention(axes: Sequence[Axes], rows: Sequence[CorrectionRow], places: dict[int | None, int]) -> None:
    """Full attention's time, and the most tokens that a round can give."""
    for row in rows:
        if row.mode == "full":
            axes[1].axhline(row.ms_per_token, color=MUTED, linestyle=":", label="full attention")
    whole = [(place, length + 1) for length, place in places.items() if length is not None]
    axes[2].plot(*zip(*whole, strict=True), color=MUTED, linestyle=":", label="T + 1, the most there can be")
