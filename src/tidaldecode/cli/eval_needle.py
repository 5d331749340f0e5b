"""`tidaldecode eval needle`: needles found in a haystack by each method, beside full attention on the same prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidaldecode.cli.command import command
from tidaldecode.cli.study import StudyOptions
from tidaldecode.cli.tables import print_table
from tidaldecode.evaluate.method_options import MethodOptions
from tidaldecode.report.labels import budget_label, share_label
from tidaldecode.report.scores import needle_heatmaps
from tidaldecode.texts.haystack import NeedleSettings
from tidaldecode.texts.text import Haystack

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import OnProgress, Study
    from tidaldecode.models import ChosenModel


@command
def needle(haystack: Haystack, settings: NeedleSettings, methods: MethodOptions, options: StudyOptions) -> None:
    """Hides a number in a long text and asks for it at the end: who finds it, at which length and depth."""
    haystack.parts()

    def make(chosen: ChosenModel, on_progress: OnProgress) -> Study:
        from tidaldecode.evaluate.needle import needles_of

        return needles_of(haystack, settings, methods, chosen, on_progress)

    report = options.run("needle.jsonl", make, settings.seed, methods.plans, max(settings.lengths))
    model, cases = report.about["model"], settings.depths * settings.repeats
    figures = options.draw(report, f"{model}, needles in {haystack.title}", needle=needle_heatmaps)
    rows = [
        (
            row.variant.label,
            budget_label(row.budget),
            *(str(row.of_length(length)[0]) for length in settings.lengths),
            f"{row.accuracy:.0%}",
            share_label(row.kv_read_fraction),
        )
        for row in report.rows
    ]
    columns = ("method", "budget", *(f"{length:,} tokens" for length in settings.lengths), "share", "KV read")
    title = f"{model}, {haystack.title}: needles found of {cases} at each length"
    print_table(options.console, title, columns, rows, no_wrap=True)
    options.show(report, figure=figures[0] if figures else None)
