"""`tidaldecode eval needle`: needles found in a haystack by each method, beside full attention on the same prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
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

if TYPE_CHECKING:
    from tidaldecode.evaluate.needle import NeedleReport


def needle(
    haystack: Annotated[
        str | None,
        typer.Option(
            "--haystack",
            metavar="DIR|F",
            help="A text, or a folder of .txt files, read whole, in the order of names. Default: Paul Graham's essays.",
        ),
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", metavar="N,...", help="Tokens of the prompts.")] = "4000",
    depths: Annotated[int, typer.Option("--depths", min=1, help="Depths, evenly spaced from start to end.")] = 10,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Needles for each length and depth.")] = 1,
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
    """Hides a number in a long text and asks for it at the end: who finds it, at which length and depth."""
    sizes = options.parse_integers("--lengths", lengths)
    results = eval_options.results_file(output, "needle.jsonl")
    if results is not None:
        check_matplotlib()
    outline = outline_of(model)
    eval_options.check_names(method, budget, plan, outline)
    parts: Iterable[str] = [paul_graham_essays()] if haystack is None else text_parts(Path(haystack))
    outline.check_context(max(sizes))
    console = Console(stderr=True)
    with console.status("starting"):  # PyTorch and Transformers take seconds to import
        from tidaldecode.evaluate.needle import (
            CELL_KEY,
            NeedleReport,
            NeedleSettings,
            cell_identity,
            find_needles,
            finished,
            needle_cases,
        )
        from tidaldecode.hf import apply
        from tidaldecode.methods.method import check_methods
        from tidaldecode.models import model_shape
        from tidaldecode.report.scores import needle_heatmaps
        from tidaldecode.results.cells import Cells
        from tidaldecode.results.environment import environment

        settings = NeedleSettings(sizes, depths, repeats, seed)
        target = options.parse_device(device)
        precision = options.parse_dtype(dtype, target)
        files = find_model(model, trust_remote_code=trust_remote_code)
        config = files.config()
        methods = eval_options.make_methods(config, method, budget, plan, selection, page_size, full_layers)
        check_methods(methods, config, min(sizes))
    with console.status("reading the haystack"):
        tokenizer = files.tokenizer()
        text = Text.tokenize(tokenizer, parts)
        cases = needle_cases(tokenizer, text, settings, config)
    where = environment(target)
    identity = cell_identity(settings, files.identity(config, target, precision), text)
    with Cells.open(results, identity, CELL_KEY, where) as cells:
        rows, began = finished(cases, methods, cells), time.perf_counter()
        if rows is None:
            with console.status("loading the model"):
                loaded = apply(files.model(target, precision), "full")
            began = time.perf_counter()
            with eval_options.progress_bar(console) as on_progress:
                rows = find_needles(loaded, text, cases, methods, cells, on_progress)
    report = NeedleReport(
        environment=where,
        model=files.title,
        dtype=str(precision).removeprefix("torch."),
        haystack="Paul Graham's essays" if haystack is None else Path(haystack).name,
        settings=settings,
        seconds=round(time.perf_counter() - began, 3),
        rows=tuple(rows),
        figure=None if results is None else str(results.with_suffix(".png")),
    )
    if report.figure is not None:
        title = f"{report.model}, needles in {report.haystack}"
        save_png(needle_heatmaps, report.rows, Path(report.figure), title)
    _print(console, report)
    sets = sets_per_kv_head(methods, model_shape(config))
    print_sets(console, sets)
    if json_output:
        print(json.dumps({**report.to_json(), "sets_per_kv_head": sets}))


def _print(console: Console, report: NeedleReport) -> None:
    settings = report.settings
    cases = settings.depths * settings.repeats
    table = Table(title=Words(f"{report.model}, {report.haystack}: needles found of {cases} at each length"))
    table.add_column("method")
    for column in ("budget", *(f"{length:,} tokens" for length in settings.lengths), "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            Words(row.variant.label),
            budget_label(row.budget),
            *(str(row.of_length(length)[0]) for length in settings.lengths),
            f"{row.accuracy:.0%}",
        )
    console.print(table)
