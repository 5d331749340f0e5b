"""`tidaldecode calibrate`: the plan for a model, found on a text and checked on another."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from tidaldecode.calibrate.settings import CalibrationSettings, check_apart
from tidaldecode.cli import eval_options, options
from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.output import output_file
from tidaldecode.cli.sets import print_sets
from tidaldecode.errors import InputError
from tidaldecode.models.find import find_model
from tidaldecode.report.drawing import check_matplotlib
from tidaldecode.texts.text import Text, paul_graham_essays, text_parts
from tidaldecode.whole_file import check_writable, is_stream

if TYPE_CHECKING:
    from tidaldecode.calibrate.report import CalibrationReport

_RULES = ("unified", "per_group", "per_head")
_DEFAULT_BUDGET = "256"
_DEFAULT_BUDGETS = "64,128,256,512,1024"
_DEFAULT_SELECT_LAYERS, _FULL_LAYERS = 5, 2
_STOPPED = 130


def calibrate(
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="F|DIR", help="A text, or a folder of .txt files. Default: Paul Graham's essays."
        ),
    ] = None,
    heldout_text: Annotated[
        str | None,
        typer.Option("--heldout-text", metavar="F|DIR", help="Text of the check. Default: the second half of --text."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="K",
            help=f"Tokens that a sparse layer reads; with --max-gap also several, K,... Default: {_DEFAULT_BUDGET}, "
            f"with --max-gap {_DEFAULT_BUDGETS}.",
        ),
    ] = None,
    select_layers: Annotated[
        int | None,
        typer.Option(
            "--select-layers", metavar="N", min=1, help=f"Layers that choose. Default: {_DEFAULT_SELECT_LAYERS}."
        ),
    ] = None,
    full_layers: Annotated[
        int | None,
        typer.Option(
            "--full-layers",
            metavar="N",
            min=0,
            help=f"Layers beside them that read everything. Default: {_FULL_LAYERS}.",
        ),
    ] = None,
    max_gap: Annotated[
        float | None,
        typer.Option(
            "--max-gap", metavar="NATS", help="Find the cheapest plan that loses so little, instead of N layers."
        ),
    ] = None,
    selection: Annotated[
        str,
        typer.Option("--selection", metavar="S,...", help="Rules of choice: of unified, per_group, per_head."),
    ] = "unified,per_group",
    per_query_head: Annotated[
        bool, typer.Option("--per-query-head", help="A set for each query head, which reads more rows.")
    ] = False,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of a window.")] = 8192,
    decode: Annotated[int, typer.Option("--decode", min=1, help="Last tokens of a window, decoded.")] = 192,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows that the plan is chosen on.")] = 4,
    heldout_windows: Annotated[
        int, typer.Option("--heldout-windows", min=1, help="Windows that it is checked on.")
    ] = 8,
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    output: Annotated[str, typer.Option("--output", metavar="F.json", help="The plan file.")] = "plan.json",
    force: Annotated[bool, typer.Option("--force", help="Replace the plan file if it exists.")] = False,
    results: Annotated[
        str | None, typer.Option("--results", metavar="DIR", help="Folder for the frontier, as JSON and PNG.")
    ] = None,
    json_output: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Finds the plan that loses least for a model; Ctrl-C keeps the best so far."""
    plan_file = _plan_file(output, force, json_output)
    rules: tuple[Any, ...] = options.parse_names("--selection", selection, _RULES)
    budgets = _budgets(budget, max_gap)
    for option, number in (("--select-layers", select_layers), ("--full-layers", full_layers)):
        if max_gap is not None and number is not None:
            raise InputError(f"give {option} or --max-gap, not both: the gap decides how many layers it takes")
    results_file = eval_options.results_file(results, "calibration.json", "--results")
    if results_file is not None:
        check_matplotlib()
    settings = CalibrationSettings(
        select_layers=(select_layers or _DEFAULT_SELECT_LAYERS) if max_gap is None else None,
        full_layers=_FULL_LAYERS if full_layers is None else full_layers,
        max_gap=max_gap,
        budgets=budgets,
        context=context,
        decode=decode,
        windows=windows,
        heldout_windows=heldout_windows,
        selections=rules,
        per_query_head=per_query_head,
        seed=seed,
    )
    parts = iter([paul_graham_essays()]) if text is None else text_parts(Path(text))
    heldout_parts = None if heldout_text is None else text_parts(Path(heldout_text))
    outline_of(model).check_context(context)
    console = Console(stderr=True)
    with console.status("starting"):  # PyTorch and Transformers take seconds to import
        import torch

        from tidaldecode.calibrate.calibration import calibrate as run_calibration
        from tidaldecode.calibrate.report import CalibrationReport
        from tidaldecode.hf import apply
        from tidaldecode.report.calibration_plots import plot_frontier
        from tidaldecode.results.environment import environment

        target = options.parse_device(device)
        precision = options.parse_dtype(dtype, target)
        files = find_model(model, trust_remote_code=trust_remote_code)
        settings.check(files.config())
    with console.status("reading the text"):
        tokenizer = files.tokenizer()
        tokens = Text.tokenize(tokenizer, parts)
        name = "Paul Graham's essays" if text is None else Path(text).resolve().name
        if heldout_parts is None:
            tokens, heldout = tokens.halves()
            name, heldout_name = f"{name}, first half", f"{name}, second half"
        else:
            heldout = Text.tokenize(tokenizer, heldout_parts)
            heldout_name = Path(str(heldout_text)).resolve().name
        check_apart(tokens, settings.starts(tokens), heldout, settings.heldout(heldout))
    if results_file is not None:
        options.make_folder("--results", results_file.parent)
        check_writable("--results", results_file)
    with console.status("loading the model"):
        torch.manual_seed(seed)
        loaded = apply(files.model(target, precision), "full")
    began = time.perf_counter()
    with eval_options.progress_bar(console) as on_progress:
        found = run_calibration(loaded, tokens, heldout, settings, on_progress)
    figure = None if results_file is None else results_file.with_suffix(".png")
    report = CalibrationReport(
        environment=environment(target),
        model=files.title,
        dtype=str(precision).removeprefix("torch."),
        text=name,
        heldout_text=heldout_name,
        settings=settings,
        seconds=round(time.perf_counter() - began, 3),
        found=found,
        figure=None if figure is None else str(figure),
    )
    report.plan.save(plan_file)
    content = report.to_json()
    if results_file is not None and figure is not None:
        report.save(results_file)
        plot_frontier(content["frontier"], figure, f"{report.model}: what plans lose, and what they read")
    _print(console, report, plan_file)
    if report.sets_per_kv_head > 1:
        print_sets(console, {"the plan": report.sets_per_kv_head})
    if json_output:
        print(json.dumps(content))
    if found.stopped:
        raise typer.Exit(_STOPPED)


def _plan_file(output: str, force: bool, json_output: bool) -> Path:
    path = output_file("--output", output, "plan.json", json_output)
    if path.exists() and not force and not is_stream(path):
        raise InputError(f"--output {output} exists: give another name, or --force to replace it")
    return path


def _budgets(text: str | None, max_gap: float | None) -> tuple[int, ...]:
    return options.parse_integers("--budget", text or (_DEFAULT_BUDGET if max_gap is None else _DEFAULT_BUDGETS))


def _print(console: Console, report: CalibrationReport, plan_file: Path) -> None:
    settings, found = report.settings, report.found
    table = Table(title=Words(f"{report.model}: nats per token above full attention, {settings.context:,} tokens"))
    for column in ("full + select", "budget", "KV read", "loss", "on text", "gap", "gap, held-out text"):
        table.add_column(column, justify="right")
    for point in found.frontier:
        roles, error = point.plan.roles, "" if point.heldout_error is None else f" ± {point.heldout_error:.3f}"
        table.add_row(
            f"{roles.count('full')} + {roles.count('select')}",
            f"{point.plan.token_budget:,}",
            f"{point.kv_read_fraction:.1%}",
            f"{point.loss.divergence:.3f}",
            f"{point.loss.text_divergence:.3f}",
            f"{point.loss.gap:+.3f}",
            "" if point.heldout_gap is None else f"{point.heldout_gap:+.3f}{error}",
            style="bold" if point is found.chosen else None,
        )
    console.print(table)
    if settings.max_gap is not None and found.chosen.loss.text_divergence > settings.max_gap:
        console.print(Words(f"no plan loses at most {settings.max_gap} nats: the best one was kept"), soft_wrap=True)
    stopped = "stopped; the best plan so far" if found.stopped else "plan"
    console.print(Words(f"{stopped}: {plan_file} ({found.tried} tried in {report.seconds:,.0f} s)"), soft_wrap=True)
