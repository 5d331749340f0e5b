"""Figure of a calibration: what the best plans lose over what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.report.drawing import INK, add_legend, line_styles, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = {
    "text_divergence": "divergence, the text it was chosen on",
    "calibration_gap": "gap, the text it was chosen on",
    "heldout_gap": "gap, held-out text",
}


def plot_frontier(frontier: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Writes `frontier_figure` as a PNG file."""
    save_png(partial(frontier_figure, frontier), path, title)


def frontier_figure(frontier: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """Nats per token over the share of the KV cache that a decode step reads, a line for each measure.

    Args:
        frontier: `kv_read_fraction`, `text_divergence`, `calibration_gap`, `heldout_gap`, `heldout_error`,
            `full_layers`, `select_layers` and `token_budget` of each plan; held-out values may be `None`.
        width: inches.
    """
    figure = new_figure(width, 3.4 if width > 5 else 3.6)
    axis = figure.subplots()
    for (key, label), style in zip(_LINES.items(), line_styles(["oracle", "full", "tidal"]), strict=True):
        known = [row for row in frontier if row[key] is not None]
        if known:
            axis.errorbar(
                [100 * row["kv_read_fraction"] for row in known],
                [row[key] for row in known],
                yerr=[row["heldout_error"] or 0 for row in known] if key == "heldout_gap" else None,
                color=style.color,
                marker=style.marker,
                label=label,
                capsize=2,
                linewidth=1.6 if key == "heldout_gap" else 1.0,
            )
    if width > 5 and len(frontier) <= 12:
        budgets = len({row["token_budget"] for row in frontier}) > 1
        for row in frontier:
            text = f"{row['full_layers']}+{row['select_layers']}" + (f", {row['token_budget']}" if budgets else "")
            place = 100 * row["kv_read_fraction"], row["text_divergence"]
            axis.annotate(text, place, xytext=(4, 5), textcoords="offset points", fontsize=8, color=INK)
    axis.set(xlabel="KV cache read in a step, % of full attention’s (full + select layers)", ylabel="nats per token")
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    add_legend(figure, width)
    return figure
