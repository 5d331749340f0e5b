"""`tidaldecode eval ppl`: perplexity of a text by each method, beside full attention on the same windows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from tidaldecode.cli import eval_options, options
from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.sets import print_sets, sets_per_kv_head
from tidaldecode.models import find_model
from tidaldecode.report.drawing import check_matplotlib, save_png
from tidaldecode.report.labels import budget_label
from tidaldecode.texts.text import Text, paul_graham_essays, text_parts
from tidaldecode.texts.windows import Windows

if TYPE_CHECKING:
    from tidaldecode.evaluate.perplexity import PerplexityReport

_FIGURES = ("ppl_budgets.png", "ppl_positions.png")


def ppl(
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="F|DIR",
            help="A text, or a folder of .txt files, read whole, in the order of names. Default: Paul Graham's essays.",
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of a window.")] = 8192,
    decode: Annotated[int, typer.Option("--decode", min=1, help="Last tokens of a window, decoded and scored.")] = 384,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows.")] = 10,
    offset: Annotated[int, typer.Option("--offset", min=0, help="First token of the first window.")] = 0,
    stride: Annotated[
        int, typer.Option("--stride", min=1, help="Tokens from one window's start to the next's.")
    ] = 15000,
    method: eval_options.Methods = "tidal",
    budget: eval_options.Budgets = None,
    plan: eval_options.Plans = "auto",
    selection: eval_options.Selections = "per_head",
    page_size: eval_options.PageSize = 16,
    full_layers: eval_options.FullLayers = None,
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    output: eval_options.Output = None,
    json_output: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Scores the last tokens of windows of a text, decoded by each method, against full attention."""
    results = eval_options.results_file(output, "ppl.jsonl")
    if results is not None:
        check_matplotlib()
    outline = outline_of(model)
    eval_options.check_names(method, budget, plan, outline)
    parts = iter([paul_graham_essays()]) if text is None else text_parts(Path(text))
    settings = Windows(context, decode, windows, offset, stride)
    outline.check_context(context)
    console = Console(stderr=True)
    with console.status("starting"):  # PyTorch and Transformers take seconds to import
        import torch

        from tidaldecode.evaluate.perplexity import (
            CELL_KEY,
            PerplexityReport,
            cell_identity,
            finished,
            perplexity,
        )
        from tidaldecode.hf import apply
        from tidaldecode.methods.method import check_methods
        from tidaldecode.models import model_shape
        from tidaldecode.report.losses import loss_over_budget, perplexity_over_position
        from tidaldecode.results.cells import Cells
        from tidaldecode.results.environment import environment

        target = options.parse_device(device)
        precision = options.parse_dtype(dtype, target)
        files = find_model(model, trust_remote_code=trust_remote_code)
        config = files.config()
        settings.check(config)
        methods = eval_options.make_methods(config, method, budget, plan, selection, page_size, full_layers)
        check_methods(methods, config, context)
    with console.status("reading the text"):
        tokens = Text.tokenize(files.tokenizer(), parts)
        settings.check_text(tokens)
    where = environment(target)
    identity = cell_identity(settings, files.identity(config, target, precision), tokens)
    with Cells.open(results, identity, CELL_KEY, where) as cells:
        rows, began = finished(settings, methods, cells), time.perf_counter()
        if rows is None:
            with console.status("loading the model"):
                torch.manual_seed(seed)
                loaded = apply(files.model(target, precision), "full")
            began = time.perf_counter()
            with eval_options.progress_bar(console) as on_progress:
                rows = perplexity(loaded, tokens, settings, methods, cells, on_progress)
    name = "Paul Graham's essays" if text is None else Path(text).name
    figures = []
    if results is not None:
        for file, draw in zip(_FIGURES, (loss_over_budget, perplexity_over_position), strict=True):
            if save_png(draw, rows, results.with_name(file), f"{files.title}, {name}"):
                figures.append(str(results.with_name(file)))
    report = PerplexityReport(
        environment=where,
        model=files.title,
        dtype=str(precision).removeprefix("torch."),
        text=name,
        settings=settings,
        seconds=round(time.perf_counter() - began, 3),
        rows=tuple(rows),
        figures=tuple(figures),
    )
    _print(console, report)
    sets = sets_per_kv_head(methods, model_shape(config))
    print_sets(console, sets)
    if json_output:
        print(json.dumps({**report.to_json(), "sets_per_kv_head": sets}))


def _print(console: Console, report: PerplexityReport) -> None:
    settings = report.settings
    scored = f"{settings.windows} windows, the last {settings.decode:,} of {settings.context:,} tokens"
    title = f"{report.model}, {report.text}: {scored}"
    table = Table(title=Words(title))
    table.add_column("method")
    for column in ("budget", "nats per token", "above full", "standard error"):
        table.add_column(column, justify="right", min_width=7)
    for row in report.rows:
        error = "" if row.gap_stderr is None else f"{row.gap_stderr:.4f}"
        gap, error = ("", "") if row.budget is None else (f"{row.gap:+.4f}", error)
        table.add_row(Words(row.variant.label), budget_label(row.budget), f"{row.nll:.4f}", gap, error)
    console.print(table)
