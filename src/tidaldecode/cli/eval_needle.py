"""`tidaldecode eval needle`: needles found in a haystack by each method, beside full attention on the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from rich.console import Console

from tidaldecode.cli.command import command
from tidaldecode.cli.progress import progress
from tidaldecode.cli.study import StudyOptions, draw
from tidaldecode.cli.tables import print_table
from tidaldecode.evaluate.method_options import MethodOptions
from tidaldecode.options import Option
from tidaldecode.report.labels import budget_label
from tidaldecode.report.scores import needle_heatmaps
from tidaldecode.texts.haystack import NeedleSettings
from tidaldecode.texts.text import TextSource


@dataclass(frozen=True)
class Haystack(TextSource):
    """Where the haystack comes from."""

    text: Annotated[
        Path | None,
        Option(
            "A text, or a folder of .txt files, read whole, in the order of names. Default: Paul Graham's essays.",
            name="--haystack",
            metavar="DIR|F",
        ),
    ] = None


@command
def needle(haystack: Haystack, settings: NeedleSettings, methods: MethodOptions, options: StudyOptions) -> None:
    """Hides a number in a long text and asks for it at the end: who finds it, at which length and depth."""
    results = options.results("needle.jsonl")
    haystack.parts()
    options.check(methods.plans, max(settings.lengths))
    console = Console(stderr=True)
    with progress(console) as on_progress:  # PyTorch and Transformers take seconds to import
        from tidaldecode.evaluate.needle import needles_of
        from tidaldecode.evaluate.study import run_study

        make = partial(needles_of, haystack, settings, methods)
        report = run_study(make, options.model, settings.seed, results, on_progress)
    model, cases = report.about["model"], settings.depths * settings.repeats
    figures = draw(report.rows, results, f"{model}, needles in {haystack.title}", needle=needle_heatmaps)
    rows = [
        (
            row.variant.label,
            budget_label(row.budget),
            *(str(row.of_length(length)[0]) for length in settings.lengths),
            f"{row.accuracy:.0%}",
        )
        for row in report.rows
    ]
    columns = ("method", "budget", *(f"{length:,} tokens" for length in settings.lengths), "share")
    title = f"{model}, {haystack.title}: needles found of {cases} at each length"
    print_table(console, title, columns, rows, no_wrap=True)
    options.show(console, report, figure=figures[0] if figures else None)
