"""`tidaldecode eval lm-eval`: any task of lm-eval by each method."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text as Words

from tidaldecode.cli.command import command
from tidaldecode.cli.output import print_json
from tidaldecode.cli.progress import progress
from tidaldecode.cli.study import StudyOptions
from tidaldecode.cli.tables import print_sets, print_table
from tidaldecode.evaluate.task_settings import TaskMethods, TaskSettings
from tidaldecode.report.labels import budget_label
from tidaldecode.results.tasks import TaskScore, lm_eval_summary

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import Report

_COLUMNS = ("method", "budget", "documents", "score", "standard error")


@command
def lm_eval(settings: TaskSettings, methods: TaskMethods, options: StudyOptions) -> None:
    """Runs tasks of lm-eval (LongBench, RULER, your own); what is answered is decoded by each method."""
    results = options.results("lm-eval.jsonl", figures=False)
    options.check(methods.plans)
    console = Console(stderr=True)
    # lm-eval and its tasks print what they like, and stdout is for the one JSON object
    with redirect_stdout(sys.stderr), progress(console) as on_progress:
        from tidaldecode.evaluate.study import run_study
        from tidaldecode.evaluate.tasks import tasks_of

        report = run_study(partial(tasks_of, settings, methods), options.model, settings.seed, results, on_progress)
        content = report.to_json()  # lm-eval computes groups
    print_tasks(console, report)
    print_sets(console, report.sets_per_kv_head)
    print_json(options.json_output, content)


def print_tasks(console: Console, report: Report) -> None:
    """A table for each task and metric: the names of both are long, and the methods are what is compared."""
    scores = lm_eval_summary(report.rows)
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        rows = [_cells(score) for score in scores if (score.task, score.metric) == (task, metric)]
        title = f"{report.about['model']}, {task}: {metric.removesuffix(',none')}"
        print_table(console, title, _COLUMNS, rows, no_wrap=True)
    cut = {row["task"]: row["truncated"] for row in report.rows if row.get("truncated")}  # by every method the same
    for task, requests in cut.items():
        what = "1 request" if requests == 1 else f"{requests:,} requests"
        console.print(Words(f"{task}: {what} did not fit the model's positions and lost the prompt's start"))


def _cells(score: TaskScore) -> tuple[str, ...]:
    error = "" if score.stderr is None else f"{score.stderr:.4f}"
    return score.variant.label, budget_label(score.budget), f"{score.samples:,}", f"{score.value:.4f}", error
