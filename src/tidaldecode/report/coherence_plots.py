"""Figures of coherence: recall between layers, and over the distance between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tidaldecode.report.drawing import COLOR_MAP, add_legend, line_styles, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Shares = Sequence[float | None]


def plot_recall_heatmaps(recalls: Mapping[str, Sequence[Shares]], path: Path, title: str) -> None:
    """Writes `recall_heatmaps` as a PNG file."""
    save_png(partial(recall_heatmaps, recalls), path, title)


def plot_recall_over_distance(distances: Mapping[str, Shares], path: Path, title: str) -> None:
    """Writes `recall_over_distance` as a PNG file."""
    save_png(partial(recall_over_distance, distances), path, title)


def recall_heatmaps(recalls: Mapping[str, Sequence[Shares]], width: float) -> Figure:
    """Recall between layers, a panel for each rule: how much of the column layer's choice the row layer's covers.

    Args:
        recalls: [layers, layers], 0 to 1, by rule; `None` where there is none. A rule may be the empty string.
        width: inches.
    """
    columns = 1 if width < 5 else min(len(recalls), 3)
    rows = math.ceil(len(recalls) / columns)
    figure = new_figure(width, 0.3 + rows * min((width - 0.8) / columns, 4.6))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(recalls) :]:
        axis.set_visible(False)
    for axis, (rule, values) in zip(axes.flat, recalls.items(), strict=False):
        layers = range(len(values))
        shown = axis.pcolormesh(
            layers, layers, _numbers(values), vmin=0, vmax=1, cmap=COLOR_MAP, rasterized=len(values) > 40
        )
        axis.set(aspect="equal", xlabel="layer that attends", title=rule, ylim=(len(values) - 0.5, -0.5))
        axis.grid(visible=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer that chooses")
    figure.colorbar(shown, ax=axes, shrink=0.8, aspect=20 * rows)
    return figure


def recall_over_distance(distances: Mapping[str, Shares], width: float) -> Figure:
    """Recall over the layers between the one that chooses and the one that attends, a line for each rule.

    Args:
        distances: the mean over pairs of layers, for each distance from 0 on, by rule; `None` where there is none.
        width: inches.
    """
    figure = new_figure(width, 3.2 if width > 5 else 3.4)
    axis = figure.subplots()
    for (rule, shares), style in zip(distances.items(), line_styles(list(distances)), strict=True):
        known = [(distance, share) for distance, share in enumerate(shares) if share is not None]
        axis.plot(
            [distance for distance, _ in known], [share for _, share in known], color=style.color, marker=style.marker,
            markersize=3, label=rule,
        )  # fmt: skip
    axis.set(xlabel="layers apart", ylabel="recall", ylim=(0, 1.03))
    axis.locator_params(axis="x", integer=True)
    add_legend(figure, width)
    return figure


def _numbers(values: Sequence[Shares]) -> list[list[float]]:
    return [[math.nan if value is None else value for value in row] for row in values]
