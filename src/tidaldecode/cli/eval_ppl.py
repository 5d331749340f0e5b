"""`tidaldecode eval ppl`: perplexity of a text by each method, beside full attention on the same windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidaldecode.cli.command import command
from tidaldecode.cli.study import StudyOptions
from tidaldecode.cli.tables import print_table
from tidaldecode.evaluate.method_options import MethodOptions
from tidaldecode.options import Seed
from tidaldecode.report.labels import budget_label, share_label
from tidaldecode.report.losses import loss_over_budget, perplexity_over_position
from tidaldecode.texts.text import TextSource
from tidaldecode.texts.windows import Windows

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import OnProgress, Study
    from tidaldecode.models import ChosenModel
    from tidaldecode.results.perplexity import PplSummary

_COLUMNS = ("method", "budget", "nats per token", "above full", "standard error", "KV read")


@command
def ppl(text: TextSource, windows: Windows, methods: MethodOptions, options: StudyOptions, seed: Seed = 0) -> None:
    """Scores the last tokens of windows of a text, decoded by each method, against full attention."""
    text.parts()

    def make(chosen: ChosenModel, on_progress: OnProgress) -> Study:
        from tidaldecode.evaluate.perplexity import perplexity_of

        return perplexity_of(text, windows, methods, chosen, on_progress)

    report = options.run("ppl.jsonl", make, seed, methods.plans, windows.context)
    title = f"{report.about['model']}, {text.title}"
    figures = options.draw(report, title, ppl_budgets=loss_over_budget, ppl_positions=perplexity_over_position)
    scored = f"{windows.windows} windows, the last {windows.decode:,} of {windows.context:,} tokens"
    print_table(options.console, f"{title}: {scored}", _COLUMNS, map(_cells, report.rows), min_width=7)
    options.show(report, figures=figures)


def _cells(row: PplSummary) -> tuple[str, ...]:
    gap = "" if row.budget is None else f"{row.gap:+.4f}"
    error = "" if row.budget is None or row.gap_stderr is None else f"{row.gap_stderr:.4f}"
    return row.variant.label, budget_label(row.budget), f"{row.nll:.4f}", gap, error, share_label(row.kv_read_fraction)
