"""Articles on quality: perplexity, needle in a haystack, lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from tidaldecode.report.article import (
    Article,
    Card,
    Table,
    environments_of,
    facts_of,
    model_of,
    page_figure,
)
from tidaldecode.report.evaluation_plots import (
    budget_sweep,
    needle_heatmaps,
    perplexity_over_position,
    task_scores,
)
from tidaldecode.report.labels import budget_label, percent, signed
from tidaldecode.report.results import Result
from tidaldecode.results.needles import NeedleSummary, needle_summary
from tidaldecode.results.perplexity import PplSummary, ppl_summary
from tidaldecode.results.rows import MethodSettings, SharedRows, budgets_of, shared_rows
from tidaldecode.results.tasks import TaskScore, lm_eval_summary

Summary = TypeVar("Summary", PplSummary, NeedleSummary)

_SAID_IN_ROWS = ("model", "nll", "full_nll", "gap", "accuracy", "full_accuracy", "figure")  # of an object of --json
_NEEDLE_CASE = ("length", "depth", "repeat")


def ppl_article(result: Result, name: str) -> Article:
    """The gap to full attention at each budget, and perplexity over position."""
    cells = shared_rows(result.rows, ("window",)) if result.of_cells else None
    summaries = [PplSummary.model_validate(row) for row in result.rows] if cells is None else ppl_summary(cells.rows)
    left_out = "" if cells is None else _left_out(cells, "window")
    figures = []
    if budgets_of(summaries):
        figures.append(
            page_figure(
                f"{name}-budgets",
                "Gap to full attention at each token budget",
                "Nats per token above full attention, which is the dashed line; bars are standard errors over windows."
                + left_out,
                partial(budget_sweep, summaries),
            )
        )
    figures.append(
        page_figure(
            f"{name}-position",
            "Perplexity over position",
            "Perplexity of the decoded tokens by their position in the context, one panel for each budget." + left_out,
            partial(perplexity_over_position, summaries),
        )
    )
    return Article(
        title=f"Perplexity of {model_of(result)}",
        file=result.file,
        facts=facts_of(result, *_SAID_IN_ROWS),
        cards=tuple(_gap_card(result, own, left_out) for own in _of_tidal(summaries)),
        figures=tuple(figures),
        tables=(_gap_table(summaries, 0 if cells is None or cells.shared else cells.known), _ppl_table(summaries)),
        environments=environments_of(result),
    )


def needle_article(result: Result, name: str) -> Article:
    """Needles found by length and depth."""
    cells = shared_rows(result.rows, _NEEDLE_CASE)
    summaries = needle_summary(cells.rows)
    left_out = _left_out(cells, "case")
    hidden = {tuple(row.get(name) for name in _NEEDLE_CASE): row["total"] for row in cells.rows}
    figure = page_figure(
        f"{name}-needles",
        "Share of the needles found",
        "One panel for each method and budget; columns are prompt lengths, rows the depth at which the needle lies. "
        "1 is every needle, 0 none." + left_out,
        partial(needle_heatmaps, summaries),
    )
    return Article(
        title=f"Needle in a haystack, {model_of(result)}",
        file=result.file,
        facts=facts_of(result, *_SAID_IN_ROWS),
        cards=tuple(_needle_card(result, own, summaries, left_out) for own in _of_tidal(summaries)),
        figures=(figure,),
        tables=(_needle_table(summaries, 0 if cells.shared else sum(hidden.values())),),
        environments=environments_of(result),
    )


def lm_eval_article(result: Result, name: str) -> Article:
    """The scores of tasks."""
    scores = lm_eval_summary(result.rows)
    first = {score.task: score.metric for score in reversed(scores)}
    main = [score for score in scores if score.metric == first[score.task]]
    figures = []
    if main:
        figures.append(
            page_figure(
                f"{name}-tasks",
                "Score of each task",
                "One point for each method and budget; bars are standard errors over the task's documents.",
                partial(task_scores, main),
            )
        )
    return Article(
        title=f"lm-eval tasks, {model_of(result)}",
        file=result.file,
        facts=facts_of(result, "model"),
        figures=tuple(figures),
        tables=(_task_table(scores),),
        environments=environments_of(result),
    )


def _of_tidal(summaries: Sequence[Summary]) -> list[list[Summary]]:
    """TidalDecode's, a list for each plan, by budget."""
    variants = dict.fromkeys(s.variant for s in summaries if s.variant.method == "tidal")
    own = [[s for s in summaries if s.variant == variant and s.budget is not None] for variant in variants]
    return [sorted(group, key=lambda s: (isinstance(s.budget, float), s.budget)) for group in own if group]


def _left_out(cells: SharedRows, what: str) -> str:
    """A sentence on what not every method and budget has, if there is such."""
    if cells.shared == cells.known:
        return ""
    if not cells.shared:
        return f" No {what} is common to all methods and budgets: they can’t be compared; † marks fewer than all."
    count = cells.known - cells.shared
    return f" Left out: {_counted(count, what)} of {cells.known:,} that not every method and budget has."


def _gap_card(result: Result, summaries: Sequence[PplSummary], left_out: str) -> Card:
    counts = sorted({summary.windows for summary in summaries})
    windows = _counted(counts[0], "window") if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} windows"
    levels = {f"{summary.full_nll:.3f}" for summary in summaries}
    full = f"’s {levels.pop()}" if len(levels) == 1 else ""
    worst = max((summary.gap_stderr or 0.0) for summary in summaries)
    error = f"; standard errors up to {worst:.3f}" if worst else ""
    return Card(
        heading="Gap to full attention",
        subject=_subject(result, summaries[0].variant),
        values=tuple((signed(summary.gap), budget_label(summary.budget)) for summary in summaries),
        at="token budget",
        note=f"Nats per token above full attention{full}, over {windows}{error}.{left_out}",
    )


def _needle_card(
    result: Result, own: Sequence[NeedleSummary], summaries: Sequence[NeedleSummary], left_out: str
) -> Card:
    full = next((summary for summary in summaries if summary.variant.method == "full"), None)
    beside = f"; full attention finds {percent(full.accuracy)} of {full.total}" if full is not None else ""
    totals = sorted({summary.total for summary in own})
    needles = _counted(totals[0], "needle") if len(totals) == 1 else f"{totals[0]:,} to {totals[-1]:,} needles"
    return Card(
        heading="Needles found",
        subject=_subject(result, own[0].variant),
        values=tuple((percent(summary.accuracy), budget_label(summary.budget)) for summary in own),
        at="token budget",
        note=f"Of {needles}{beside}.{left_out}",
    )


def _subject(result: Result, variant: MethodSettings) -> str:
    return model_of(result) + ("" if variant.plan is None else f", plan {variant.plan}")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _gap_table(summaries: Sequence[PplSummary], marked_below: int) -> Table:
    """Methods by budgets."""
    gaps = {(s.variant, budget_label(s.budget)): s for s in summaries if s.budget is not None}
    budgets = [budget_label(budget) for budget in budgets_of(summaries)]
    rows = [
        (variant.label, *(_gap(gaps.get((variant, budget)), marked_below) for budget in budgets))
        for variant in dict.fromkeys(variant for variant, _ in gaps)
    ]
    title = "Gap, nats per token ± standard error, by token budget"
    if marked_below:
        title += f"; † over fewer than all {marked_below:,} windows"
    return Table(title, ("method", *budgets), tuple(rows))


def _gap(summary: PplSummary | None, marked_below: int) -> str:
    if summary is None:
        return "–"
    error = "" if summary.gap_stderr is None else f" ± {summary.gap_stderr:.3f}"
    return signed(summary.gap) + error + _mark(summary.windows, marked_below)


def _mark(count: int, marked_below: int) -> str:
    return " †" if count < marked_below else ""


def _ppl_table(summaries: Sequence[PplSummary]) -> Table:
    columns = ("method", "budget", "nats per token", "full attention", "perplexity", "windows", "tokens")
    rows = [
        (
            summary.variant.label,
            budget_label(summary.budget) or "–",
            f"{summary.nll:.4f}",
            f"{summary.full_nll:.4f}",
            f"{math.exp(summary.nll):,.2f}",
            f"{summary.windows:,}",
            f"{summary.tokens:,}",
        )
        for summary in summaries
    ]
    return Table("All numbers", columns, tuple(rows), folded=True)


def _needle_table(summaries: Sequence[NeedleSummary], marked_below: int) -> Table:
    """Full attention first, then method by method."""
    lengths = sorted({cell.length for summary in summaries for cell in summary.cells})
    order = sorted(
        dict.fromkeys(summary.variant for summary in summaries), key=lambda variant: variant.method != "full"
    )
    rows = [
        (
            summary.variant.label,
            budget_label(summary.budget) or "–",
            *(_found(*summary.of_length(length)) for length in lengths),
            _found(summary.correct, summary.total) + _mark(summary.total, marked_below),
        )
        for summary in sorted(summaries, key=lambda summary: order.index(summary.variant))
    ]
    columns = ("method", "budget", *(f"{length:,} tokens" for length in lengths), "all")
    title = f"Needles found; † of fewer than all {marked_below:,}" if marked_below else "Needles found"
    return Table(title, columns, tuple(rows))


def _found(correct: int, total: int) -> str:
    return f"{correct:,}/{total:,}" if total else "–"


def _task_table(scores: Sequence[TaskScore]) -> Table:
    """Tasks by methods and budgets."""
    runs = dict.fromkeys((score.variant, budget_label(score.budget)) for score in scores)
    found = {(s.task, s.metric, s.variant, budget_label(s.budget)): s for s in scores}
    rows = [
        (task, metric.removesuffix(",none"), f"{samples:,}", *(_score(found.get((task, metric, *run))) for run in runs))
        for (task, metric), samples in {(score.task, score.metric): score.samples for score in scores}.items()
    ]
    methods = (f"{variant.label}, {budget}" if budget else variant.label for variant, budget in runs)
    return Table("Scores ± standard error", ("task", "metric", "samples", *methods), tuple(rows))


def _score(score: TaskScore | None) -> str:
    if score is None:
        return "–"
    return f"{score.value:,.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}")
