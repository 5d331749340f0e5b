"""`tidaldecode eval lm-eval`: any task of lm-eval by each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text as Words

from tidaldecode.cli.command import command
from tidaldecode.cli.study import StudyOptions
from tidaldecode.cli.tables import print_table
from tidaldecode.evaluate.task_settings import TaskMethods, TaskSettings
from tidaldecode.report.labels import budget_label
from tidaldecode.results.tasks import TaskScore, lm_eval_summary

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import OnProgress, Report, Study
    from tidaldecode.models import ChosenModel

_COLUMNS = ("method", "budget", "documents", "score", "standard error")


@command
def lm_eval(settings: TaskSettings, methods: TaskMethods, options: StudyOptions) -> None:
    """Runs tasks of lm-eval (LongBench, RULER, your own); what is answered is decoded by each method."""

    def make(chosen: ChosenModel, on_progress: OnProgress) -> Study:
        from tidaldecode.evaluate.tasks import tasks_of

        return tasks_of(settings, methods, chosen, on_progress)

    report = options.run("lm-eval.jsonl", make, settings.seed, methods.plans, figures=False)
    print_tasks(options.console, report)
    options.show(report)


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
