"""Figures of shares from 0 to 1: needles found, scores of tasks, recall between layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode.report.drawing import (
    COLOR_MAP,
    PAPER,
    Line,
    add_legend,
    label_panels,
    line_panels,
    line_styles,
    panels,
)
from tidaldecode.report.labels import budget_label, budget_words
from tidaldecode.results.needles import NeedleSummary
from tidaldecode.results.tasks import TaskScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LETTER = 0.068  # inches of a letter in a panel's title

Shares = Sequence[float | None]


def needle_heatmaps(summaries: Sequence[NeedleSummary], width: float) -> Figure:
    """Share of the needles found.

    One panel for each method and budget; columns are prompt lengths, rows the depth at which the needle lies. 1 is
    every needle, 0 none.
    """
    lengths = sorted({cell.length for summary in summaries for cell in summary.cells})
    depths = sorted({cell.depth for summary in summaries for cell in summary.cells})
    shown, columns = _arranged(summaries, max(1, int(width / max(1.2, 0.4 + 0.3 * len(lengths)))))
    height = 0.4 + math.ceil(len(shown) / columns) * max(1.2, 0.6 + 0.17 * len(depths))
    figure, axes = panels(width, height, len(shown), columns, sharex=True, sharey=True)
    for axis, summary in zip(axes, shown, strict=True):
        shares = {(cell.length, cell.depth): cell.correct / cell.total for cell in summary.cells}
        grid = [[shares.get((length, depth)) for length in lengths] for depth in depths]
        _heatmap(axis, grid, edgecolors=PAPER)
        for (length, depth), share in shares.items():
            place = lengths.index(length), depths.index(depth)
            text, color = f"{share:.2g}".removeprefix("0") or "0", "white" if share < 0.5 else "#111111"
            axis.text(*place, text, color=color, fontsize=7, ha="center", va="center").set_in_layout(False)
        parts, letters = summary.variant.label.split(", "), int((width - 0.5) / columns / _LETTER)
        lines = [line for part in (*parts, budget_words(summary.budget)) for line in textwrap.wrap(part, letters)]
        axis.set_title("\n".join(lines), fontsize=7.5)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        marked = sorted({round(part * (len(depths) - 1) / 4) for part in range(5)})
        axis.set_yticks(marked, [f"{depths[place]:.2g}" for place in marked])
        axis.set_ylim(len(depths) - 0.5, -0.5)
        axis.tick_params(length=0, labelsize=7)
        axis.spines[:].set_visible(False)
    label_panels(axes, columns, "prompt, tokens", "depth")
    return figure


def task_scores(scores: Sequence[TaskScore], width: float) -> Figure:
    """Score of each task.

    One point for each method and budget, a panel for each metric; bars are one standard error over the task's
    documents.

    Args:
        scores: of one file, one metric for each task.
        width: inches.
    """
    runs = list(dict.fromkeys((score.variant, score.budget) for score in scores))
    styles = line_styles([variant.method for variant, _ in runs])
    metrics = list(dict.fromkeys(score.metric for score in scores))
    tasks = [list(dict.fromkeys(s.task for s in scores if s.metric == metric)) for metric in metrics]
    heights = [(0.11 * len(runs) + 0.16) * len(names) + 0.5 for names in tasks]
    height = sum(heights) + 0.4 + 0.17 * len(runs)
    figure, axes = panels(width, height, len(metrics), gridspec_kw={"height_ratios": heights})
    for axis, metric, names in zip(axes, metrics, tasks, strict=True):
        for index, ((variant, budget), style) in enumerate(zip(runs, styles, strict=True)):
            own = [s for s in scores if (s.metric, s.variant, s.budget) == (metric, variant, budget)]
            axis.errorbar(
                [s.value for s in own],
                [names.index(s.task) + (index + 0.5) * 0.8 / len(runs) - 0.4 for s in own],
                xerr=[s.stderr or 0.0 for s in own],
                label=", ".join(filter(None, (variant.label, budget_label(budget)))),
                color=style.color,
                marker=style.marker,
                linestyle="none",
                elinewidth=1,
            )
        axis.set(xlabel=metric.removesuffix(",none"), ylim=(len(names) - 0.5, -0.5))
        axis.set_yticks(range(len(names)), names)
        axis.grid(visible=False, axis="y")
        axis.grid(visible=True, axis="x")
    add_legend(figure, width)
    return figure


def recall_heatmaps(recalls: Mapping[str, Sequence[Shares]], width: float) -> Figure:
    """Recall between layers.

    Share of the column layer’s attention that the row layer’s choice of tokens covers, 0 to 1.

    Args:
        recalls: [layers, layers], 0 to 1, by rule; `None` where there is none. A rule may be the empty string.
        width: inches.
    """
    columns = 1 if width < 5 else min(len(recalls), 3)
    rows = math.ceil(len(recalls) / columns)
    height = 0.3 + rows * min((width - 0.8) / columns, 4.6)
    figure, axes = panels(width, height, len(recalls), columns, sharex=True, sharey=True)
    for axis, (rule, values) in zip(axes, recalls.items(), strict=True):
        shown = _heatmap(axis, values, rasterized=len(values) > 40)
        axis.set(aspect="equal", title=rule, ylim=(len(values) - 0.5, -0.5))
    label_panels(axes, columns, "layer that attends", "layer that chooses")
    figure.colorbar(shown, ax=axes, shrink=0.8, aspect=20 * rows)
    return figure


def recall_over_distance(distances: Mapping[str, Shares], width: float) -> Figure:
    """Recall over distance.

    The mean over all pairs of layers so far apart.

    Args:
        distances: for each distance from 0 on, by rule; `None` where there is none.
        width: inches.
    """
    lines = []
    for (rule, shares), style in zip(distances.items(), line_styles(list(distances)), strict=True):
        known = {distance: share for distance, share in enumerate(shares) if share is not None}
        lines.append(Line(rule, style, list(known), list(known.values()), None, {"markersize": 3}))
    figure, (axis,) = line_panels(width, 2.7, [("", lines)], "layers apart", "recall")
    axis.set_ylim(0, 1.03)
    axis.locator_params(axis="x", integer=True)
    return figure


def _heatmap(axis: Axes, values: Sequence[Shares], **more: Any) -> Any:
    """Squares of the colours of shares, the first row's middles at 0; what is `None` stays empty."""
    import matplotlib

    numbers = [[math.nan if value is None else value for value in row] for row in values]
    edges = [[place - 0.5 for place in range(count + 1)] for count in (len(values[0]), len(values))]
    colors: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": matplotlib.colormaps[COLOR_MAP], "linewidth": 1}
    axis.grid(visible=False)
    return axis.pcolormesh(*edges, numbers, **colors, **more)


def _arranged(summaries: Sequence[NeedleSummary], columns: int) -> tuple[list[NeedleSummary], int]:
    """Panels row by row, and how many make a row.

    Where it fits, a row is one method: full attention, then the method's budgets. Else they follow each other.
    """
    full = [summary for summary in summaries if summary.budget is None]
    others = [summary for summary in summaries if summary.budget is not None]
    variants = list(dict.fromkeys(summary.variant for summary in others))
    methods = [[*full[:1], *(summary for summary in others if summary.variant == v)] for v in variants]
    widths = {len(row) for row in methods}
    if len(full) <= 1 and len(widths) == 1 and max(widths) <= columns:
        return [summary for row in methods for summary in row], max(widths)
    return [*full, *others], min(columns, len(summaries))
