"""`tidaldecode eval lm-eval`: any task of lm-eval by each method."""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from tidaldecode.cli import eval_options, options
from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.sets import print_sets, sets_per_kv_head
from tidaldecode.errors import InputError
from tidaldecode.evaluate.lm_eval_there import check_lm_eval
from tidaldecode.models import find_model
from tidaldecode.report.labels import budget_label
from tidaldecode.results.tasks import lm_eval_summary

if TYPE_CHECKING:
    from tidaldecode.evaluate.lm_eval_tasks import LmEvalReport

Methods = Annotated[
    str, typer.Option("--method", metavar="M,...", help="Of full, tidal, quest, streaming, oracle. Only these run.")
]


def lm_eval(
    tasks: Annotated[str, typer.Option("--tasks", metavar="T,...", help="Tasks, groups, tags, patterns with *.")],
    include_path: Annotated[
        str | None, typer.Option("--include-path", metavar="DIR", help="Folder of task files (YAML) of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First documents of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Solved examples before each question.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    metadata: Annotated[
        str | None,
        typer.Option("--metadata", metavar="JSON", help='Passed on to tasks; of RULER: {"max_seq_lengths": [4096]}.'),
    ] = None,
    method: Methods = "full,tidal",
    budget: eval_options.Budgets = None,
    plan: eval_options.Plans = "auto",
    selection: eval_options.Selections = "per_head",
    page_size: eval_options.PageSize = 16,
    full_layers: eval_options.FullLayers = None,
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 1234,
    output: eval_options.Output = None,
    json_output: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Runs tasks of lm-eval (LongBench, RULER, your own); what is answered is decoded by each method."""
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",")))
    extra = _parse_metadata(metadata)
    results = eval_options.results_file(output, "lm-eval.jsonl")
    task_folder = None if include_path is None else Path(include_path)
    check_lm_eval(task_folder)
    eval_options.check_names(method, budget, plan, outline_of(model))
    console = Console(stderr=True)
    # lm-eval and its tasks print what they like, and stdout is for the one JSON object
    with redirect_stdout(sys.stderr), console.status("starting") as status:
        from tidaldecode.evaluate.lm_eval_tasks import (
            CELL_KEY,
            LmEvalReport,
            TaskSettings,
            cell_identity,
            evaluate_tasks,
            find_tasks,
            finished,
            load_tasks,
            results_by_method,
            tokenizer_metadata,
        )
        from tidaldecode.hf import apply
        from tidaldecode.methods.method import check_methods
        from tidaldecode.models import model_shape
        from tidaldecode.results.cells import Cells
        from tidaldecode.results.environment import environment

        target = options.parse_device(device)
        precision = options.parse_dtype(dtype, target)
        files = find_model(model, trust_remote_code=trust_remote_code)
        config = files.config()
        methods = eval_options.make_methods(config, method, budget, plan, selection, page_size, full_layers)
        check_methods(methods, config, config.max_position_embeddings)
        tokenizer = files.tokenizer()
        settings = TaskSettings(names, task_folder, limit, num_fewshot, chat_template, extra, seed)
        settings.check(tokenizer)
        status.update("loading the tasks")
        with tokenizer_metadata(tokenizer) as known:
            manager, names = find_tasks(settings, known)
            loaded = load_tasks(manager, names, settings, config)
        where = environment(target)
        identity = cell_identity(settings, files.identity(config, target, precision))
        with Cells.open(results, identity, CELL_KEY, where) as cells:
            rows, began = finished(loaded, methods, cells), time.perf_counter()
            if rows is None:
                status.update("loading the model")
                weights = apply(files.model(target, precision), "full")
                status.stop()
                began = time.perf_counter()
                with eval_options.progress_bar(console) as on_progress:
                    rows = evaluate_tasks(weights, tokenizer, loaded, settings, methods, cells, on_progress)
        report = LmEvalReport(
            environment=where,
            model=files.title,
            dtype=str(precision).removeprefix("torch."),
            settings=settings,
            seconds=round(time.perf_counter() - began, 3),
            results=results_by_method(rows, methods, loaded),
            rows=tuple(rows),
        )
    _print(console, report)
    sets = sets_per_kv_head(methods, model_shape(config))
    print_sets(console, sets)
    if json_output:
        print(json.dumps({**report.to_json(), "sets_per_kv_head": sets}))


def _parse_metadata(text: str | None) -> dict[str, Any]:
    try:
        metadata = {} if text is None else json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise InputError(f'--metadata {text!r} is no JSON object: give one such as {{"max_seq_lengths": [4096]}}')
    return metadata


def _print(console: Console, report: LmEvalReport) -> None:
    """A table for each task and metric: the names of both are long, and the methods are what is compared."""
    scores = lm_eval_summary(report.rows)
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        table = Table(title=Words(f"{report.model}, {task}: {metric.removesuffix(',none')}"))
        table.add_column("method")
        for column in ("budget", "documents", "score", "standard error"):
            table.add_column(column, justify="right", no_wrap=True)
        for score in scores:
            if (score.task, score.metric) == (task, metric):
                table.add_row(
                    Words(score.variant.label),
                    budget_label(score.budget),
                    f"{score.samples:,}",
                    f"{score.value:.4f}",
                    "" if score.stderr is None else f"{score.stderr:.4f}",
                )
        console.print(table)
    cut = {row["task"]: row["truncated"] for row in report.rows if row.get("truncated")}  # by every method the same
    for task, requests in cut.items():
        what = "1 request" if requests == 1 else f"{requests:,} requests"
        console.print(Words(f"{task}: {what} did not fit the model's positions and lost the prompt's start"))
