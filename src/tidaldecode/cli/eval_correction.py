"""`tidaldecode eval correction`: cache correction and lossless decoding over the tokens between two full passes."""

from __future__ import annotations

import json
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
    from tidaldecode.evaluate.correction import CorrectionReport

_FIGURE = "correction.png"


def correction(
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="F|DIR", help="A text, or a folder of .txt files. Default: Paul Graham's essays."
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of a window.")] = 8192,
    decode: Annotated[int, typer.Option("--decode", min=1, help="Last tokens of a window, decoded and scored.")] = 256,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows.")] = 4,
    offset: Annotated[int, typer.Option("--offset", min=0, help="First token of the first window.")] = 0,
    stride: Annotated[
        int, typer.Option("--stride", min=1, help="Tokens from one window's start to the next's.")
    ] = 15000,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="T,...", help="Tokens between two passes with full attention.")
    ] = "4,8,16,32,64",
    budget: Annotated[
        str, typer.Option("--budget", metavar="K,...", help="Tokens a sparse layer reads, or fractions of the context.")
    ] = "128,256,512",
    plan: options.Plan = "auto",
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    output: eval_options.Output = None,
    json_output: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measures what correcting the cache every T tokens, and verifying every T tokens, give and take."""
    drafts, budgets = options.parse_integers("--lengths", lengths), options.parse_budgets(budget, "--budget")
    results = eval_options.results_file(output, "correction.jsonl")
    if results is not None:
        check_matplotlib()
    outline = outline_of(model)
    outline.check_plan(plan)
    parts = iter([paul_graham_essays()]) if text is None else text_parts(Path(text))
    settings = Windows(context, decode, windows, offset, stride)
    outline.check_context(context)
    console = Console(stderr=True)
    with console.status("starting"):  # PyTorch and Transformers take seconds to import
        import torch

        from tidaldecode.evaluate.correction import CELL_KEY, CorrectionReport, cell_identity, study, variants
        from tidaldecode.hf import apply
        from tidaldecode.hf.second_pass import check_second_pass
        from tidaldecode.methods.method import check_methods
        from tidaldecode.models import model_shape
        from tidaldecode.plans.find import find_plan
        from tidaldecode.report.losses import correction_panels
        from tidaldecode.results.cells import Cells
        from tidaldecode.results.environment import environment

        target = options.parse_device(device)
        precision = options.parse_dtype(dtype, target)
        files = find_model(model, trust_remote_code=trust_remote_code)
        config = files.config()
        settings.check(config)
        check_second_pass(config, f"--model {model}")
        wanted = list(variants(find_plan(plan, config), budgets, drafts))
        check_methods([variant.method for variant in wanted], config, context)
    with console.status("reading the text"):
        tokens = Text.tokenize(files.tokenizer(), parts)
        settings.check_text(tokens)
    where = environment(target)
    identity = cell_identity(settings, files.identity(config, target, precision), tokens)
    with Cells.open(results, identity, CELL_KEY, where) as cells:
        with console.status("loading the model"):
            torch.manual_seed(seed)
            loaded = apply(files.model(target, precision), "full")
        with eval_options.progress_bar(console) as on_progress:
            rows = study(loaded, tokens, settings, wanted, cells, on_progress)
    report = CorrectionReport(
        environment=where,
        model=files.title,
        dtype=str(precision).removeprefix("torch."),
        text="Paul Graham's essays" if text is None else Path(text).name,
        plan=wanted[-1].method.plan.name if wanted[-1].method.plan else None,
        settings=settings,
        rows=tuple(rows),
        figure=None if results is None else str(results.with_name(_FIGURE)),
    )
    if results is not None:
        title = f"{report.model}, {report.text}, plan {report.plan}"
        save_png(correction_panels, rows, results.with_name(_FIGURE), title)
    _print(console, report)
    sets = sets_per_kv_head([variant.method for variant in wanted], model_shape(config))
    print_sets(console, sets)
    if json_output:
        print(json.dumps({**report.to_json(), "sets_per_kv_head": sets}))


def _print(console: Console, report: CorrectionReport) -> None:
    settings = report.settings
    scored = f"{settings.windows} windows, the last {settings.decode:,} of {settings.context:,} tokens"
    table = Table(title=Words(f"{report.model}, {report.text}: {scored}"))
    table.add_column("")
    for column in ("budget", "T", "above full, nats", "ms per token", "speed-up", "tokens per round"):
        table.add_column(column, justify="right")
    for row in report.rows:
        accepted = "" if row.accepted_per_round is None else f"{row.accepted_per_round:.2f}"
        length = "" if row.length is None else str(row.length)
        times = f"{row.ms_per_token:.1f}", f"{row.speedup:.2f}"
        table.add_row(row.mode, budget_label(row.budget), length, f"{row.gap:+.4f}", *times, accepted)
    console.print(table)
