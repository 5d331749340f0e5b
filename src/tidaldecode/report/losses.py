"""Figures of what methods lose: over what they read, over the position, over the tokens between two full passes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode.report.drawing import (
    INK,
    MUTED,
    LineStyle,
    add_legend,
    draw_line,
    label_panels,
    line_styles,
    panels,
    set_ticks,
)
from tidaldecode.report.labels import budget_label, budget_words
from tidaldecode.results.correction import CorrectionRow
from tidaldecode.results.perplexity import PplSummary
from tidaldecode.results.rows import MethodSettings, budgets_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAST = 0.01  # nats: below it the scale of losses is linear, and goes through 0
_FRONTIER = {
    "text_divergence": "divergence, the text it was chosen on",
    "calibration_gap": "gap, the text it was chosen on",
    "heldout_gap": "gap, held-out text",
}


def loss_over_share(groups: Mapping[str, Mapping[PplSummary, float]], width: float) -> Figure | None:
    """The gap to full attention over the share of K and V that a step reads, a panel for each group of windows.

    Args:
        groups: by title, the share of each method and budget.
        width: inches.
    """
    if not groups:
        return None
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = panels(width, 4.0 * len(groups) + 0.4, len(groups))
    for axis, (title, shares) in zip(axes, groups.items(), strict=True):
        _gaps(axis, {summary: 100 * share for summary, share in shares.items()})
        axis.set_title(textwrap.fill(title, int(width * 12)))
        axis.set(xscale="log", xlabel="K and V that a step reads, %", ylabel="loss, nats per token")
        axis.set_yscale("symlog", linthresh=_LEAST)
        lowest = min(summary.gap - (summary.gap_stderr or 0) for summary in shares)
        axis.set_ylim(min(0, 1.5 * lowest), max(_LEAST, 1.5 * max(summary.gap for summary in shares)))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    add_legend(figure, width)
    return figure


def loss_over_budget(summaries: Sequence[PplSummary], width: float) -> Figure | None:
    """The gap to full attention over the budget, a line for each method; `None` of full attention alone."""
    places = {summary: _budget_tokens(summary) for summary in summaries if summary.budget is not None}
    if not places:
        return None
    figure, (axis,) = panels(width, 3.5)
    _gaps(axis, places)
    axis.set(xscale="log", xlabel="token budget", ylabel="gap, nats per token")
    set_ticks(axis, {tokens: budget_label(summary.budget) for summary, tokens in places.items()})
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    add_legend(figure, width)
    return figure


def perplexity_over_position(summaries: Sequence[PplSummary], width: float) -> Figure | None:
    """Perplexity over the position in the context, a panel for each budget; full attention in each."""
    if not summaries:
        return None
    styles = _styles(summaries)
    full = [summary for summary in summaries if summary.budget is None]
    budgets = [budget_label(budget) for budget in budgets_of(summaries)]
    shown = [[s for s in summaries if budget_label(s.budget) == budget] for budget in budgets] or [[]]
    columns = min(len(shown), 3 if width > 5 else 1)
    height = 0.6 + (2.0 if width > 5 else 1.6) * math.ceil(len(shown) / columns) + 0.17 * len(styles)
    figure, axes = panels(width, height, len(shown), columns, sharex=True, sharey=True)
    for axis, own in zip(axes, shown, strict=True):
        for summary in [*full, *own]:
            values = [math.exp(nll) for nll in summary.nll_by_position]
            middles = [summary.first_position + (bin_ + 0.5) * summary.bin_tokens for bin_ in range(len(values))]
            draw_line(
                axis, middles, values, styles[summary.variant], summary.variant.label, markersize=2.5, linewidth=1.2,
                zorder=_height(summary.variant),
            )  # fmt: skip
        axis.set_title(f"budget {budget_words(own[0].budget)}" if own else "all tokens")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=4)
    label_panels(axes, columns, "position, tokens", "perplexity")
    add_legend(figure, width)
    return figure


def frontier(rows: Sequence[Mapping[str, Any]], width: float) -> Figure | None:
    """Nats per token over the share of K and V that a decode step reads, a line for each measure.

    Args:
        rows: `kv_read_fraction`, `text_divergence`, `calibration_gap`, `heldout_gap`, `heldout_error`, `full_layers`,
            `select_layers` and `token_budget` of each plan; held-out values may be `None`.
        width: inches.
    """
    if not rows:
        return None
    figure, (axis,) = panels(width, 3.5)
    for (key, label), style in zip(_FRONTIER.items(), line_styles(["oracle", "full", "tidal"]), strict=True):
        known = [row for row in rows if row[key] is not None]
        errors = [row["heldout_error"] for row in known] if key == "heldout_gap" else None
        shares, values = [100 * row["kv_read_fraction"] for row in known], [row[key] for row in known]
        if known:
            draw_line(axis, shares, values, style, label, errors, linewidth=1.6 if errors else 1.0)
    if width > 5 and len(rows) <= 12:
        budgets = len({row["token_budget"] for row in rows}) > 1
        for row in rows:
            text = f"{row['full_layers']}+{row['select_layers']}" + (f", {row['token_budget']}" if budgets else "")
            place = 100 * row["kv_read_fraction"], row["text_divergence"]
            axis.annotate(text, place, xytext=(4, 5), textcoords="offset points", fontsize=8, color=INK)
    axis.set(xlabel="K and V read in a step, % of full attention’s (full + select layers)", ylabel="nats per token")
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    add_legend(figure, width)
    return figure


def correction_panels(rows: Sequence[CorrectionRow], width: float) -> Figure:
    """Gap, milliseconds per token and tokens per round over the tokens between two full passes.

    The gap of a few windows may be below 0. A plan and budget has a colour; lossless decoding is dashed.
    """
    figure, axes = panels(width, 3.4 if width > 5 else 8, 3, 3 if width > 5 else 1)
    lengths = sorted({row.length for row in rows if row.length is not None})
    places: dict[int | None, int] = {length: place for place, length in enumerate([*lengths, None])}
    ways = list(dict.fromkeys((row.plan, row.budget) for row in rows if row.mode != "full"))
    several = len({plan for plan, _ in ways}) > 1
    for (plan, budget), style in zip(ways, line_styles(["tidal", *["spare"] * (len(ways) - 1)]), strict=True):
        own = sorted((row for row in rows if (row.plan, row.budget) == (plan, budget)), key=lambda r: places[r.length])
        corrected, lossless = [r for r in own if r.mode != "lossless"], [r for r in own if r.mode == "lossless"]
        name = (f"{plan}, " if several else "") + f"budget {budget_label(budget)}"
        for axis, field, shown in (
            (axes[0], "gap", corrected),
            (axes[1], "ms_per_token", corrected),
            (axes[1], "ms_per_token", lossless),
            (axes[2], "accepted_per_round", lossless),
        ):
            way, dashes = ("lossless", "--") if shown is lossless else ("correction", "-")
            where, values = [places[row.length] for row in shown], [getattr(row, field) for row in shown]
            errors = [row.gap_stderr for row in shown] if field == "gap" else None
            draw_line(axis, where, values, style, f"{name}, {way}", errors, linestyle=dashes)
    for row in rows:
        if row.mode == "full":
            axes[1].axhline(row.ms_per_token, color=MUTED, linestyle=":", label="full attention")
    most = "T + 1, the most there can be"
    axes[2].plot(range(len(lengths)), [length + 1 for length in lengths], color=MUTED, linestyle=":", label=most)
    for axis, title in zip(axes, ("nats per token above full", "ms per token", "tokens out per round"), strict=True):
        set_ticks(axis, {place: "none" if length is None else str(length) for length, place in places.items()})
        axis.set(title=title, xlabel="tokens between full passes", ylim=(min(0, axis.get_ylim()[0]), None))
    axes[2].set_xlim(axes[0].get_xlim())
    add_legend(figure, width)
    return figure


def _gaps(axis: Axes, places: Mapping[PplSummary, float]) -> None:
    """A line for each method, the oracle's dashed; bars are standard errors. Full attention is the line at 0."""
    axis.axhline(0, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, label="full attention")
    for variant, style in _styles(list(places)).items():
        own = sorted((s for s in places if s.variant == variant and s.budget is not None), key=places.__getitem__)
        draw_line(
            axis, [places[s] for s in own], [s.gap for s in own], style, variant.label, [s.gap_stderr for s in own],
            zorder=_height(variant), linestyle="--" if variant.method == "oracle" else "-",
        )  # fmt: skip


def _styles(summaries: Sequence[PplSummary]) -> dict[MethodSettings, LineStyle]:
    variants = list(dict.fromkeys(summary.variant for summary in summaries))
    return dict(zip(variants, line_styles([variant.method for variant in variants]), strict=True))


def _height(variant: MethodSettings) -> float:
    """TidalDecode's lines lie on those of others, where they meet."""
    return 2.2 if variant.method == "tidal" else 2.1


def _budget_tokens(summary: PplSummary) -> float:
    """The budget in tokens; a fraction is of the longest context."""
    if isinstance(summary.budget, float):
        return summary.budget * (summary.first_position + len(summary.nll_by_position) * summary.bin_tokens)
    return summary.budget or 0
