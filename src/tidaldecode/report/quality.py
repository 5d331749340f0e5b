"""Articles on quality: perplexity, needle in a haystack, lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from tidaldecode.evaluate.summary import (
    NeedleSummary,
    PplSummary,
    TaskScore,
    Variant,
    budgets_of,
    lm_eval_summary,
    needle_summary,
    ppl_summary,
    ppl_summary_of,
)
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

Summary = TypeVar("Summary", PplSummary, NeedleSummary)

_SAID_IN_ROWS = ("model", "nll", "full_nll", "gap", "accuracy", "full_accuracy", "figure")  # of an object of --json


def ppl_article(result: Result, name: str) -> Article:
    """The gap to full attention at each budget, and perplexity over position."""
    summaries = ppl_summary(result.rows) if result.of_cells else [ppl_summary_of(row) for row in result.rows]
    figures = []
    if any(summary.budget is not None for summary in summaries):
        figures.append(
            page_figure(
                f"{name}-budgets",
                "Gap to full attention at each token budget",
                "Nats per token above full attention, which is the dashed line; bars are standard errors over windows.",
                partial(budget_sweep, summaries),
            )
        )
    figures.append(
        page_figure(
            f"{name}-position",
            "Perplexity over position",
            "Perplexity of the decoded tokens by their position in the context, one panel for each budget.",
            partial(perplexity_over_position, summaries),
        )
    )
    return Article(
        title=f"Perplexity of {model_of(result)}",
        file=result.file,
        facts=facts_of(result, *_SAID_IN_ROWS),
        cards=tuple(_gap_card(result, own) for own in _of_tidal(summaries)),
        figures=tuple(figures),
        tables=(_gap_table(summaries), _ppl_table(summaries)),
        environments=environments_of(result),
    )


def needle_article(result: Result, name: str) -> Article:
    """Needles found by length and depth."""
    summaries = needle_summary(result.rows)
    figure = page_figure(
        f"{name}-needles",
        "Share of the needles found",
        "One panel for each method and budget; columns are prompt lengths, rows the depth at which the needle lies. "
        "1 is every needle, 0 none.",
        partial(needle_heatmaps, summaries),
    )
    return Article(
        title=f"Needle in a haystack, {model_of(result)}",
        file=result.file,
        facts=facts_of(result, *_SAID_IN_ROWS),
        cards=tuple(_needle_card(result, own, summaries) for own in _of_tidal(summaries)),
        figures=(figure,),
        tables=(_needle_table(summaries),),
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


def _gap_card(result: Result, summaries: Sequence[PplSummary]) -> Card:
    windows, full = summaries[0].windows, summaries[0].full_nll
    worst = max((summary.gap_stderr or 0.0) for summary in summaries)
    error = f"; standard errors up to {worst:.3f}" if worst else ""
    return Card(
        heading="Gap to full attention",
        subject=_subject(result, summaries[0].variant),
        values=tuple((signed(summary.gap), budget_label(summary.budget)) for summary in summaries),
        at="token budget",
        note=f"Nats per token above full attention’s {full:.3f}, over {_counted(windows, 'window')}{error}.",
    )


def _needle_card(result: Result, own: Sequence[NeedleSummary], summaries: Sequence[NeedleSummary]) -> Card:
    full = next((summary for summary in summaries if summary.variant.method == "full"), None)
    beside = f"; full attention finds {percent(full.accuracy)} of {full.total}" if full is not None else ""
    return Card(
        heading="Needles found",
        subject=_subject(result, own[0].variant),
        values=tuple((percent(summary.accuracy), budget_label(summary.budget)) for summary in own),
        at="token budget",
        note=f"Of {_counted(own[0].total, 'needle')}{beside}.",
    )


def _subject(result: Result, variant: Variant) -> str:
    return model_of(result) + ("" if variant.plan is None else f", plan {variant.plan}")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _gap_table(summaries: Sequence[PplSummary]) -> Table:
    """Methods by budgets."""
    gaps = {(s.variant, budget_label(s.budget)): s for s in summaries if s.budget is not None}
    budgets = [budget_label(budget) for budget in budgets_of(summaries)]
    rows = [
        (variant.label, *(_gap(gaps.get((variant, budget))) for budget in budgets))
        for variant in dict.fromkeys(variant for variant, _ in gaps)
    ]
    return Table("Gap, nats per token ± standard error, by token budget", ("method", *budgets), tuple(rows))


def _gap(summary: PplSummary | None) -> str:
    if summary is None:
        return "–"
    return signed(summary.gap) + ("" if summary.gap_stderr is None else f" ± {summary.gap_stderr:.3f}")


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


def _needle_table(summaries: Sequence[NeedleSummary]) -> Table:
    lengths = sorted({cell.length for summary in summaries for cell in summary.cells})
    rows = [
        (
            summary.variant.label,
            budget_label(summary.budget) or "–",
            *("{}/{}".format(*summary.of_length(length)) for length in lengths),
            f"{summary.correct}/{summary.total}",
        )
        for summary in sorted(summaries, key=lambda summary: summary.variant.method != "full")
    ]
    columns = ("method", "budget", *(f"{length:,} tokens" for length in lengths), "all")
    return Table("Needles found", columns, tuple(rows))


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
