"""`tidaldecode calibrate`: the plan for a model, found on a text and checked on another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text as Words

from tidaldecode.calibrate.settings import CalibrationSettings
from tidaldecode.cli.command import command
from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.output import Json, output_file, print_json, results_file
from tidaldecode.cli.progress import progress
from tidaldecode.cli.tables import print_sets, print_table
from tidaldecode.errors import InputError
from tidaldecode.models import ModelOptions
from tidaldecode.options import Option
from tidaldecode.texts.text import TextSource
from tidaldecode.whole_file import is_stream

if TYPE_CHECKING:
    from tidaldecode.calibrate.points import Point
    from tidaldecode.calibrate.written import CalibrationReport

_STOPPED = 130


@command
def calibrate(
    text: TextSource,
    settings: CalibrationSettings,
    model: ModelOptions,
    heldout_text: Annotated[
        Path | None, Option("Text of the check. Default: the second half of --text.", metavar="F|DIR")
    ] = None,
    output: Annotated[Path, Option("The plan file.", metavar="F.json")] = Path("plan.json"),
    force: Annotated[bool, Option("Replace the plan file if it exists.")] = False,
    results: Annotated[Path | None, Option("Folder for the frontier, as JSON and PNG.", metavar="DIR")] = None,
    json_output: Json = False,
) -> None:
    """Finds the plan that loses least for a model; Ctrl-C keeps the best so far."""
    plan_file = _plan_file(output, force, json_output)
    results_json = results_file("--results", results, "calibration.json")
    heldout = None if heldout_text is None else TextSource(heldout_text)
    for source in (text, heldout):
        if source is not None:
            source.parts()
    outline_of(model.model).check_context(settings.context)
    console = Console(stderr=True)
    with progress(console) as on_progress:  # PyTorch and Transformers take seconds to import
        from tidaldecode.calibrate.run import report_calibration

        report = report_calibration(model, text, heldout, settings, plan_file, results_json, on_progress)
    _draw(report)
    _print(console, report, plan_file)
    print_json(json_output, report.to_json())
    if report.found.stopped:
        raise typer.Exit(_STOPPED)


def _plan_file(output: Path, force: bool, json_output: bool) -> Path:
    path = output_file("--output", output, "plan.json", json_output)
    if path.exists() and not force and not is_stream(path):
        raise InputError(f"--output {output} exists: give another name, or --force to replace it")
    return path


def _draw(report: CalibrationReport) -> None:
    from tidaldecode.report.drawing import save_png
    from tidaldecode.report.losses import frontier

    if report.figure is not None:
        title = f"{report.about['model']}: what plans lose, and what they read"
        save_png(frontier, report.to_json()["frontier"], Path(report.figure), title)


def _print(console: Console, report: CalibrationReport, plan_file: Path) -> None:
    settings, found = report.settings, report.found
    model, seconds = report.about["model"], report.about["seconds"]
    columns = ("full + choosing", "budget", "KV read", "loss", "on text", "gap", "gap, held-out text")
    title = f"{model}: nats per token above full attention, {settings.context:,} tokens"
    print_table(console, title, columns, map(_cells, found.frontier), False, found.frontier.index(found.chosen))
    if settings.max_gap is not None and found.chosen.loss.text_divergence > settings.max_gap:
        console.print(Words(f"no plan loses at most {settings.max_gap} nats: the best one was kept"), soft_wrap=True)
    if (surprise := found.chosen.heldout_surprise) is not None:
        error = found.chosen.heldout_surprise_error
        words = "answers about the held-out text: full attention finds them {:+.3f}{} nats per token less probable"
        console.print(Words(words.format(surprise, "" if error is None else f" ± {error:.3f}")), soft_wrap=True)
    stopped = "stopped; the best plan so far" if found.stopped else "plan"
    console.print(Words(f"{stopped}: {plan_file} ({found.tried} tried in {seconds:,.0f} s)"), soft_wrap=True)
    if report.sets_per_kv_head > 1:
        print_sets(console, {"the plan": report.sets_per_kv_head})


def _budgets(point: Point) -> str:
    plan = point.plan
    budgets = sorted({plan.token_budget, *(plan.budgets or {}).values()})
    return f"{budgets[0]:,}" if len(budgets) == 1 else f"{budgets[0]:,} to {budgets[-1]:,}"


def _cells(point: Point) -> tuple[str, ...]:
    roles, error = point.plan.roles, "" if point.heldout_error is None else f" ± {point.heldout_error:.3f}"
    return (
        f"{roles.count('full')} + {roles.count('select') + roles.count('quantized_select')}",
        _budgets(point),
        f"{point.kv_read_fraction:.1%}",
        f"{point.loss.divergence:.3f}",
        f"{point.loss.text_divergence:.3f}",
        f"{point.loss.gap:+.3f}",
        "" if point.heldout_gap is None else f"{point.heldout_gap:+.3f}{error}",
    )
