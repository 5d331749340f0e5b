"""Figures of what methods lose: over what they read, over the position, over the tokens between two full passes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode.report.drawing import INK, MUTED, Line, LineStyle, line_panels, line_styles, set_ticks
from tidaldecode.report.labels import budget_label, budget_words
from tidaldecode.results.correction import CorrectionRow
from tidaldecode.results.perplexity import PplSummary
from tidaldecode.results.rows import MethodSettings, budgets_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 0.01  # nats: below it the scale of losses is linear, and goes through 0
_FRONTIER = {
    "text_divergence": "divergence, the text it was chosen on",
    "calibration_gap": "gap, the text it was chosen on",
    "heldout_gap": "gap, held-out text",
}


def loss_over_share(groups: Mapping[str, Mapping[PplSummary, float]], width: float) -> Figure:
    """Loss over what is read.

    Nats per token above full attention over the share of K and V that a decode step reads: the lower left is better.
    Both scales are logarithmic, that of losses linear near 0. The oracle, dashed, reads the best tokens that scores can
    choose and saves no time: it is the floor. Bars are one standard error over windows.

    Args:
        groups: by title, the share of each method at each budget.
        width: inches.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    shown = [
        (textwrap.fill(title, int(width * 12)), _gaps({s: 100 * share for s, share in shares.items()}))
        for title, shares in groups.items()
    ]
    labels = "K and V that a step reads, %", "loss, nats per token"
    figure, axes = line_panels(width, 3.0, shown, *labels, level=0, scales={"xscale": "log"})
    for axis, shares in zip(axes, groups.values(), strict=True):
        axis.set_yscale("symlog", linthresh=_LEAST)
        lowest = min(summary.gap - (summary.gap_stderr or 0) for summary in shares)
        axis.set_ylim(min(0, 1.5 * lowest), max(_LEAST, 1.5 * max(summary.gap for summary in shares)))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    return figure


def loss_over_budget(summaries: Sequence[PplSummary], width: float) -> Figure | None:
    """Gap to full attention at each token budget.

    Nats per token above full attention, which is the dashed line; bars are one standard error over windows.
    """
    places = {summary: _budget_tokens(summary) for summary in summaries if summary.budget is not None}
    if not places:
        return None
    labels = "token budget", "gap, nats per token"
    figure, (axis,) = line_panels(width, 2.6, [("", _gaps(places))], *labels, level=0, scales={"xscale": "log"})
    set_ticks(axis, {tokens: budget_label(summary.budget) for summary, tokens in places.items()})
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    return figure


def perplexity_over_position(summaries: Sequence[PplSummary], width: float) -> Figure:
    """Perplexity over position.

    Perplexity of the decoded tokens by their position in the context, one panel for each budget.
    """
    styles = _styles(summaries)
    full = [summary for summary in summaries if summary.budget is None]
    shown = []
    for budget in dict.fromkeys(map(budget_label, budgets_of(summaries))) or [""]:
        own = [summary for summary in summaries if budget and budget_label(summary.budget) == budget]
        lines = []
        for summary in [*full, *own]:
            values = [math.exp(nll) for nll in summary.nll_by_position]
            middles = [summary.first_position + (bin_ + 0.5) * summary.bin_tokens for bin_ in range(len(values))]
            more = {"markersize": 2.5, "linewidth": 1.2, "zorder": _height(summary.variant)}
            lines.append(Line(summary.variant.label, styles[summary.variant], middles, values, None, more))
        shown.append((f"budget {budget_words(own[0].budget)}" if own else "all tokens", lines))
    columns = min(len(shown), 3 if width > 5 else 1)
    height = 2.0 if width > 5 else 1.7
    labels = "position, tokens", "perplexity"
    figure, axes = line_panels(width, height, shown, *labels, columns, sharex=True, sharey=True)
    for axis in axes:
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=4)
    return figure


def frontier(rows: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """Loss over cost.

    The best plans found: nats per token over the share of K and V that a step reads. Numbers at the points are full and
    choosing layers; bars are one standard error over windows.

    Args:
        rows: `kv_read_fraction`, `text_divergence`, `calibration_gap`, `heldout_gap`, `heldout_error`, `full_layers`,
            `select_layers` and `token_budget` of each plan; held-out values may be `None`.
        width: inches.
    """
    lines = []
    for (key, label), style in zip(_FRONTIER.items(), line_styles(["oracle", "full", "tidal"]), strict=True):
        known = [row for row in rows if row[key] is not None]
        errors = [row["heldout_error"] for row in known] if key == "heldout_gap" else None
        shares = [100 * row["kv_read_fraction"] for row in known]
        lines += [Line(label, style, shares, [row[key] for row in known], errors)] if known else []
    labels = "K and V read in a step, % of full attention’s (full + choosing layers)", "nats per token"
    figure, (axis,) = line_panels(width, 2.7, [("", lines)], *labels)
    if width > 5 and len(rows) <= 12:
        budgets = len({row["token_budget"] for row in rows}) > 1
        for row in rows:
            choosing = row["select_layers"] + row.get("quantized_select_layers", 0)
            text = f"{row['full_layers']}+{choosing}" + (f", {row['token_budget']}" if budgets else "")
            place = 100 * row["kv_read_fraction"], row["text_divergence"]
            axis.annotate(text, place, xytext=(4, 5), textcoords="offset points", fontsize=8, color=INK)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    return figure


def correction_panels(rows: Sequence[CorrectionRow], width: float) -> Figure:
    """Tokens between two passes with full attention.

    Nats per token above full attention, milliseconds per token, and tokens that come out of a round of lossless
    decoding; one colour a budget, lossless decoding dashed. Bars are one standard error over windows.
    """
    lengths = sorted({row.length for row in rows if row.length is not None})
    places = {str(length): place for place, length in enumerate([*lengths, None])}
    ways = list(dict.fromkeys((row.plan, row.budget) for row in rows if row.mode != "full"))
    several = len({plan for plan, _ in ways}) > 1
    gaps, times, rounds = [], [], []
    for way, style in zip(ways, line_styles(["tidal", *["spare"] * (len(ways) - 1)]), strict=True):
        name = (f"{way[0]}, " if several else "") + f"budget {budget_label(way[1])}"
        for lossless in (False, True):
            own = [r for r in rows if (r.plan, r.budget) == way and (r.mode == "lossless") == lossless]
            own.sort(key=lambda row: places[str(row.length)])
            where = [places[str(row.length)] for row in own]
            label, more = (
                f"{name}, {'lossless' if lossless else 'correction'}",
                {"linestyle": "--" if lossless else "-"},
            )
            times.append(Line(label, style, where, [row.ms_per_token for row in own], None, more))
            if lossless:
                rounds.append(Line(label, style, where, [row.accepted_per_round or 0 for row in own], None, more))
            else:
                gaps.append(Line(label, style, where, [r.gap for r in own], [r.gap_stderr for r in own], more))
    dotted, ends = {"linestyle": ":"}, (0, len(lengths))
    full = [[row.ms_per_token] * 2 for row in rows if row.mode == "full"]
    times += [Line("full attention", LineStyle(MUTED, ""), ends, level, None, dotted) for level in full]
    most = [length + 1 for length in lengths]
    rounds.append(Line("T + 1, the most there can be", LineStyle(MUTED, ""), range(len(most)), most, None, dotted))
    shown = [("nats per token above full", gaps), ("ms per token", times), ("tokens out per round", rounds)]
    columns, height = (3, 2.6) if width > 5 else (1, 2.3)
    figure, axes = line_panels(width, height, shown, "tokens between full passes", "", columns)
    for axis in axes:
        set_ticks(axis, {place: name.replace("None", "none") for name, place in places.items()})
        axis.set(ylim=(min(0, axis.get_ylim()[0]), None), xlim=axes[0].get_xlim())
    return figure


def _gaps(places: Mapping[PplSummary, float]) -> list[Line]:
    """A line for each method over places, the oracle's dashed, with standard errors."""
    lines = []
    for variant, style in _styles(list(places)).items():
        own = sorted((summary for summary in places if summary.variant == variant), key=places.__getitem__)
        more = {"zorder": _height(variant), "linestyle": "--" if variant.method == "oracle" else "-"}
        gaps, errors = [summary.gap for summary in own], [summary.gap_stderr for summary in own]
        lines.append(Line(variant.label, style, [places[summary] for summary in own], gaps, errors, more))
    return lines


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
