"""Figures of quality: perplexity against the budget and over position, needles by length and depth, task scores."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.report.drawing import (
    COLOR_MAP,
    INK,
    MUTED,
    PAPER,
    LineStyle,
    add_legend,
    line_styles,
    new_figure,
    save_png,
)
from tidaldecode.report.labels import budget_label, budget_words
from tidaldecode.results.needles import NeedleSummary
from tidaldecode.results.perplexity import PplSummary
from tidaldecode.results.rows import MethodSettings, budgets_of
from tidaldecode.results.tasks import TaskScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_budget_sweep(summaries: Sequence[PplSummary], path: Path, title: str) -> bool:
    """Writes `budget_sweep` as a PNG file.

    Returns:
        Whether there was anything to plot: of full attention alone there is no file.
    """
    if not budgets_of(summaries):
        return False
    save_png(partial(budget_sweep, summaries), path, title)
    return True


def plot_perplexity_over_position(summaries: Sequence[PplSummary], path: Path, title: str) -> bool:
    """Writes `perplexity_over_position` as a PNG file. Returns whether there was anything to plot."""
    if not summaries:
        return False
    save_png(partial(perplexity_over_position, summaries), path, title)
    return True


def plot_needle_heatmaps(summaries: Sequence[NeedleSummary], path: Path, title: str) -> bool:
    """Writes `needle_heatmaps` as a PNG file. Returns whether there was anything to plot."""
    if not summaries:
        return False
    save_png(partial(needle_heatmaps, summaries), path, title)
    return True


def budget_sweep(summaries: Sequence[PplSummary], width: float) -> Figure:
    """The gap to full attention against the budget, a line for each method; bars are standard errors.

    Args:
        summaries: of one file, some with a budget; full attention is the line at 0.
        width: inches.
    """
    figure = new_figure(width, 3.4 if width > 5 else 3.6)
    axis = figure.subplots()
    axis.axhline(0, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, label="full attention")
    ticks: dict[float, str] = {}
    for variant, style in _styles(summaries).items():
        own = sorted((s for s in summaries if s.variant == variant and s.budget is not None), key=_tokens_read)
        if not own:
            continue
        tokens = [_tokens_read(summary) for summary in own]
        ticks |= {count: budget_label(summary.budget) for count, summary in zip(tokens, own, strict=True)}
        errors = [summary.gap_stderr or 0.0 for summary in own]
        axis.errorbar(
            tokens, [s.gap for s in own], errors, color=style.color, marker=style.marker, capsize=2.5, elinewidth=1,
            label=variant.label, zorder=_height(variant),
        )  # fmt: skip
    axis.set_xscale("log")
    _ticks(axis, ticks)
    axis.set(xlabel="token budget", ylabel="gap, nats per token")
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    add_legend(figure, width)
    return figure


def perplexity_over_position(summaries: Sequence[PplSummary], width: float) -> Figure:
    """Perplexity over the position in the context, a panel for each budget; full attention in each.

    Args:
        summaries: of one file.
        width: inches.
    """
    styles = _styles(summaries)
    full = [summary for summary in summaries if summary.budget is None]
    budgets = [budget_label(budget) for budget in budgets_of(summaries)]
    shown = [[s for s in summaries if budget_label(s.budget) == budget] for budget in budgets]
    columns = min(len(shown) or 1, 3 if width > 5 else 1)
    rows = math.ceil(len(shown) / columns) or 1
    figure = new_figure(width, 0.6 + (2.0 if width > 5 else 1.6) * rows + 0.17 * len(styles))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, own in zip(axes.flat, shown or [[]], strict=False):
        for summary in [*full, *own]:
            style = styles[summary.variant]
            axis.plot(
                _positions(summary), [math.exp(nll) for nll in summary.nll_by_position], color=style.color,
                marker=style.marker, markersize=2.5, linewidth=1.2, label=summary.variant.label,
                zorder=_height(summary.variant),
            )  # fmt: skip
        axis.set_title(f"budget {budget_words(own[0].budget)}" if own else "all tokens")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=4)
    _finish_panels(axes, len(shown) or 1, "position, tokens", "perplexity")
    add_legend(figure, width)
    return figure


def needle_heatmaps(summaries: Sequence[NeedleSummary], width: float) -> Figure:
    """Share of the needles found by length and depth, a panel for each method and budget, full attention first.

    Args:
        summaries: of one file.
        width: inches.
    """
    lengths = sorted({cell.length for summary in summaries for cell in summary.cells})
    depths = sorted({cell.depth for summary in summaries for cell in summary.cells})
    shown, columns = _arranged(summaries, max(1, int(width / max(1.2, 0.4 + 0.3 * len(lengths)))))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(width, 0.4 + rows * max(1.2, 0.6 + 0.17 * len(depths)))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, summary in zip(axes.flat, shown, strict=False):
        _heatmap(axis, summary, lengths, depths, int((width - 0.5) / columns / _LETTER))
    _finish_panels(axes, len(shown), "prompt, tokens", "depth")
    return figure


def task_scores(scores: Sequence[TaskScore], width: float) -> Figure:
    """The scores of tasks, a panel for each metric, a point for each method and budget; bars are standard errors.

    Args:
        scores: of one file, one metric for each task.
        width: inches.
    """
    runs = list(dict.fromkeys((score.variant, score.budget) for score in scores))
    styles = dict(zip(runs, line_styles([variant.method for variant, _ in runs]), strict=True))
    metrics = list(dict.fromkeys(score.metric for score in scores))
    tasks = {m: list(dict.fromkeys(s.task for s in scores if s.metric == m)) for m in metrics}
    step = 0.11 * len(runs) + 0.16  # inches for each task
    heights = [step * len(tasks[metric]) + 0.5 for metric in metrics]
    figure = new_figure(width, sum(heights) + 0.4 + 0.17 * len(runs))
    axes = figure.subplots(len(metrics), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, metric in zip(axes, metrics, strict=True):
        for index, (variant, budget) in enumerate(runs):
            own = [s for s in scores if (s.metric, s.variant, s.budget) == (metric, variant, budget)]
            places = [tasks[metric].index(s.task) + (index + 0.5) * 0.8 / len(runs) - 0.4 for s in own]
            label = variant.label if budget is None else f"{variant.label}, {budget_label(budget)}"
            axis.errorbar(
                [s.value for s in own], places, xerr=[s.stderr or 0.0 for s in own], linestyle="none", label=label,
                color=styles[variant, budget].color, marker=styles[variant, budget].marker, elinewidth=1,
            )  # fmt: skip
        axis.set(
            xlabel=metric.removesuffix(",none"), yticks=range(len(tasks[metric])), ylim=(len(tasks[metric]) - 0.5, -0.5)
        )
        axis.set_yticklabels(tasks[metric])
        axis.grid(visible=False, axis="y")
        axis.grid(visible=True, axis="x")
    add_legend(figure, width)
    return figure


_LETTER = 0.068  # inches of a letter in a panel's title


def _heatmap(axis: Axes, summary: NeedleSummary, lengths: list[int], depths: list[float], letters: int) -> None:
    import matplotlib

    shares = {(cell.length, cell.depth): cell.correct / cell.total for cell in summary.cells}
    grid = [[shares.get((length, depth), math.nan) for length in lengths] for depth in depths]
    axis.pcolormesh(grid, vmin=0, vmax=1, cmap=matplotlib.colormaps[COLOR_MAP], edgecolors=PAPER, linewidth=1)
    for (length, depth), share in shares.items():
        place = (lengths.index(length) + 0.5, depths.index(depth) + 0.5)
        color = "white" if share < 0.5 else "#111111"
        axis.text(*place, _share(share), color=color, fontsize=7, ha="center", va="center").set_in_layout(False)
    budget = "all tokens" if summary.budget is None else budget_words(summary.budget)
    lines = [line for part in (*summary.variant.label.split(", "), budget) for line in textwrap.wrap(part, letters)]
    axis.set_title("\n".join(lines), fontsize=7.5)
    axis.set_xticks([index + 0.5 for index in range(len(lengths))], [f"{length:,}" for length in lengths], fontsize=7)
    marked = sorted({round(part * (len(depths) - 1) / 4) for part in range(5)})
    axis.set_yticks([index + 0.5 for index in marked], [f"{depths[index]:.2g}" for index in marked], fontsize=7)
    axis.set_ylim(len(depths), 0)
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


def _share(share: float) -> str:
    return f"{share:.2g}".removeprefix("0") or "0"


def _styles(summaries: Sequence[PplSummary]) -> dict[MethodSettings, LineStyle]:
    variants = list(dict.fromkeys(summary.variant for summary in summaries))
    return dict(zip(variants, line_styles([variant.method for variant in variants]), strict=True))


def _height(variant: MethodSettings) -> float:
    """TidalDecode's lines lie on those of others, where they meet."""
    return 2.2 if variant.method == "tidal" else 2.1


def _tokens_read(summary: PplSummary) -> float:
    """The budget in tokens; a fraction is of the longest context."""
    if isinstance(summary.budget, float):
        return summary.budget * (summary.first_position + len(summary.nll_by_position) * summary.bin_tokens)
    return summary.budget or 0


def _positions(summary: PplSummary) -> list[float]:
    """The middle of each bin."""
    return [
        summary.first_position + (index + 0.5) * summary.bin_tokens for index in range(len(summary.nll_by_position))
    ]


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


def _finish_panels(axes: Any, shown: int, xlabel: str, ylabel: str) -> None:
    """Hides the panels that are left over, and labels the lowest one of each column."""
    columns = axes.shape[1]
    for index, axis in enumerate(axes.flat):
        axis.set_visible(index < shown)
        if index < shown <= index + columns:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel(xlabel)
        if index % columns == 0:
            axis.set_ylabel(ylabel)


def _ticks(axis: Axes, ticks: dict[float, str]) -> None:
    from matplotlib.ticker import NullLocator

    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(list(ticks), list(ticks.values()), color=INK)
