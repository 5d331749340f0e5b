"""`tidaldecode eval ppl`: perplexity of a text by each method, beside full attention on the same windows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from tidaldecode.cli.command import command
from tidaldecode.cli.progress import progress
from tidaldecode.cli.study import StudyOptions, draw
from tidaldecode.cli.tables import print_table
from tidaldecode.evaluate.method_options import MethodOptions
from tidaldecode.options import Seed
from tidaldecode.report.labels import budget_label
from tidaldecode.report.losses import loss_over_budget, perplexity_over_position
from tidaldecode.texts.text import TextSource
from tidaldecode.texts.windows import Windows

if TYPE_CHECKING:
    from tidaldecode.results.perplexity import PplSummary

_COLUMNS = ("method", "budget", "nats per token", "above full", "standard error")


@command
def ppl(text: TextSource, windows: Windows, methods: MethodOptions, options: StudyOptions, seed: Seed = 0) -> None:
    """Scores the last tokens of windows of a text, decoded by each method, against full attention."""
    results = options.results("ppl.jsonl")
    text.parts()
    options.check(methods.plans, windows.context)
    console = Console(stderr=True)
    with progress(console) as on_progress:  # PyTorch and Transformers take seconds to import
        from tidaldecode.evaluate.perplexity import perplexity_of
        from tidaldecode.evaluate.study import run_study

        report = run_study(partial(perplexity_of, text, windows, methods), options.model, seed, results, on_progress)
    title = f"{report.about['model']}, {text.title}"
    drawings = {"ppl_budgets": loss_over_budget, "ppl_positions": perplexity_over_position}
    figures = draw(report.rows, results, title, **drawings)
    scored = f"{windows.windows} windows, the last {windows.decode:,} of {windows.context:,} tokens"
    print_table(console, f"{title}: {scored}", _COLUMNS, map(_cells, report.rows), min_width=7)
    options.show(console, report, figures=figures)


def _cells(row: PplSummary) -> tuple[str, ...]:
    gap = "" if row.budget is None else f"{row.gap:+.4f}"
    error = "" if row.budget is None or row.gap_stderr is None else f"{row.gap_stderr:.4f}"
    return row.variant.label, budget_label(row.budget), f"{row.nll:.4f}", gap, error
