"""`tidaldecode coherence`: how much of what a layer attends to, an earlier layer's choice of tokens covers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from tidaldecode.cli import eval_options, options
from tidaldecode.cli.outline import outline_of
from tidaldecode.models.find import find_model
from tidaldecode.report.drawing import check_matplotlib
from tidaldecode.texts.text import Text, paul_graham_essays, text_parts
from tidaldecode.texts.windows import Windows
from tidaldecode.whole_file import check_writable

if TYPE_CHECKING:
    from tidaldecode.calibrate.coherence import CoherenceReport

_RULES = ("unified", "per_group", "per_head")
_FIGURES = ("coherence.png", "coherence_distance.png")


def coherence(
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="F|DIR", help="A text, or a folder of .txt files. Default: Paul Graham's essays."
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of a window.")] = 4096,
    decode: Annotated[int, typer.Option("--decode", min=1, help="Last tokens of a window, decoded.")] = 64,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows.")] = 4,
    offset: Annotated[int, typer.Option("--offset", min=0, help="First token of the first window.")] = 0,
    stride: Annotated[
        int, typer.Option("--stride", min=1, help="Tokens from one window's start to the next's.")
    ] = 15000,
    budget: Annotated[
        str, typer.Option("--budget", metavar="K", help="Tokens that a layer chooses, or a fraction of the context.")
    ] = "256",
    selection: Annotated[
        str, typer.Option("--selection", metavar="S,...", help="Whose scores choose: of unified, per_group, per_head.")
    ] = ",".join(_RULES),
    sink_tokens: Annotated[
        int, typer.Option("--sink-tokens", metavar="N", min=0, help="First tokens that every choice holds.")
    ] = 0,
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="Folder of results.")] = None,
    json_output: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measures how much of what a layer attends to, an earlier layer's choice of tokens covers, on a text."""
    rules: tuple[Any, ...] = options.parse_names("--selection", selection, _RULES)
    size = options.parse_budget(budget)
    assert size is not None
    results = eval_options.results_file(output, "coherence.json")
    if results is not None:
        check_matplotlib()
    outline = outline_of(model)
    parts = iter([paul_graham_essays()]) if text is None else text_parts(Path(text))
    places = Windows(context, decode, windows, offset, stride)
    outline.check_context(context)
    console = Console(stderr=True)
    with console.status("starting"):  # PyTorch and Transformers take seconds to import
        import torch

        from tidaldecode.calibrate.coherence import CoherenceReport, CoherenceSettings
        from tidaldecode.calibrate.coherence import coherence as measure
        from tidaldecode.hf import apply
        from tidaldecode.methods.method import tokens_of
        from tidaldecode.report.coherence_plots import plot_recall_heatmaps, plot_recall_over_distance
        from tidaldecode.results.environment import environment

        settings = CoherenceSettings(places, rules, tokens_of(size, context), sink_tokens)
        target = options.parse_device(device)
        precision = options.parse_dtype(dtype, target)
        files = find_model(model, trust_remote_code=trust_remote_code)
        settings.check(files.config())
    with console.status("reading the text"):
        tokens = Text.tokenize(files.tokenizer(), parts)
        places.check_text(tokens)
    if results is not None:
        options.make_folder("--output", results.parent)
        check_writable("--output", results)
    with console.status("loading the model"):
        torch.manual_seed(seed)
        loaded = apply(files.model(target, precision), "full")
    began = time.perf_counter()
    with eval_options.progress_bar(console) as on_progress:
        found = measure(loaded, tokens, settings, on_progress)
    report = CoherenceReport(
        environment=environment(target),
        model=files.title,
        dtype=str(precision).removeprefix("torch."),
        text="Paul Graham's essays" if text is None else Path(text).name,
        settings=settings,
        seed=seed,
        seconds=round(time.perf_counter() - began, 3),
        coherence=found,
        figure=None if results is None else str(results.with_name(_FIGURES[0])),
        distance_figure=None if results is None else str(results.with_name(_FIGURES[1])),
    )
    if results is not None:
        report.save(results)
        title = f"{report.model}, {report.text}: recall, budget {settings.budget:,} of {context:,} tokens"
        plot_recall_heatmaps(found.matrices, results.with_name(_FIGURES[0]), title)
        plot_recall_over_distance(found.distances, results.with_name(_FIGURES[1]), title)
    _print(console, report)
    if json_output:
        print(json.dumps(report.to_json()))


def _print(console: Console, report: CoherenceReport) -> None:
    settings = report.settings
    title = f"{report.model}, {report.text}: recall of {settings.budget:,} of {settings.windows.context:,} tokens"
    table = Table(title=Words(title))
    table.add_column("layers apart", justify="right")
    for rule in settings.selections:
        table.add_column(rule, justify="right")
    distances = report.coherence.distances.values()
    for distance, shares in enumerate(zip(*distances, strict=True)):
        if distance.bit_count() == 1:  # 1, 2, 4, ...
            table.add_row(str(distance), *("" if share is None else f"{share:.3f}" for share in shares))
    console.print(table)
