"""`tidaldecode coherence`: how much of what a layer attends to, an earlier layer's choice of tokens covers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tidaldecode.calibrate.settings import CoherenceSettings
from tidaldecode.cli.command import command
from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.output import Folder, Json, print_json, results_file
from tidaldecode.cli.progress import progress
from tidaldecode.cli.tables import print_table
from tidaldecode.models import ModelOptions
from tidaldecode.texts.text import TextSource

if TYPE_CHECKING:
    from tidaldecode.calibrate.written import CoherenceReport


@command
def coherence(
    text: TextSource,
    settings: CoherenceSettings,
    model: ModelOptions,
    output: Folder = None,
    json_output: Json = False,
) -> None:
    """Measures how much of what a layer attends to, an earlier layer's choice of tokens covers, on a text."""
    results = results_file("--output", output, "coherence.json")
    text.parts()
    outline_of(model.model).check_context(settings.windows.context)
    console = Console(stderr=True)
    with progress(console) as on_progress:  # PyTorch and Transformers take seconds to import
        from tidaldecode.calibrate.run import report_coherence

        report = report_coherence(model, text, settings, results, on_progress)
    _draw(report)
    _print(console, report)
    print_json(json_output, report.to_json())


def _draw(report: CoherenceReport) -> None:
    from tidaldecode.report.drawing import save_png
    from tidaldecode.report.scores import recall_heatmaps, recall_over_distance

    tokens, context = report.settings.tokens, report.settings.windows.context
    title = f"{report.about['model']}, {report.about['text']}: recall, budget {tokens:,} of {context:,} tokens"
    if report.figure is not None:
        save_png(recall_heatmaps, report.coherence.matrices, Path(report.figure), title)
    if report.distance_figure is not None:
        save_png(recall_over_distance, report.coherence.distances, Path(report.distance_figure), title)


def _print(console: Console, report: CoherenceReport) -> None:
    settings = report.settings
    about, tokens, context = report.about, settings.tokens, settings.windows.context
    title = f"{about['model']}, {about['text']}: recall of {tokens:,} of {context:,} tokens"
    distances = enumerate(zip(*report.coherence.distances.values(), strict=True))
    rows = (
        (str(distance), *("" if share is None else f"{share:.3f}" for share in shares))
        for distance, shares in distances
        if distance.bit_count() == 1  # 1, 2, 4, ...
    )
    print_table(console, title, ("layers apart", *settings.selections), rows, names=False)
