"""`tidaldecode eval lm-eval`: any task of lm-eval by each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text as Words

from tidaldecode.cli.command import command
from tidaldecode.cli.study import StudyOptions
from tidaldecode.cli.tables import print_table
from tidaldecode.evaluate.task_settings import TaskMethods, TaskSettings
from tidaldecode.report.labels import budget_label, share_label
from tidaldecode.results.tasks import RulerMean, TaskScore, lm_eval_summary, ruler_means

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import OnProgress, Report, Study
    from tidaldecode.models import ChosenModel

_COLUMNS = ("method", "budget", "documents", "score", "±", "KV read")


@command
def lm_eval(settings: TaskSettings, methods: TaskMethods, options: StudyOptions) -> None:
    """Runs tasks of lm-eval (RULER, LongBench, your own); what is answered is decoded by each method."""

    def make(chosen: ChosenModel, on_progress: OnProgress) -> Study:
        from tidaldecode.evaluate.tasks import tasks_of

        return tasks_of(settings, methods, chosen, on_progress)

    report = options.run("lm-eval.jsonl", make, settings.seed, methods.plans, figures=False)
    print_tasks(options.console, report)
    for task, why in options.show(report).get("left_out", {}).items():
        options.console.print(Words(f"{task} is left out: {why}"))


def print_tasks(console: Console, report: Report) -> None:
    """A table for each task and metric: the names of both are long, and the methods are what is compared."""
    model, scores, means = report.about["model"], lm_eval_summary(report.rows), ruler_means(report.rows)
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        own = [score for score in scores if (score.task, score.metric) == (task, metric)]
        what = metric.removesuffix(",none") if own[0].length is None else f"{own[0].length:,} tokens"
        print_table(console, f"{model}, {task}: {what}", _COLUMNS, map(_cells, own), no_wrap=True)
    for length in dict.fromkeys(mean.length for mean in means):
        rows = [_cells(mean) for mean in means if mean.length == length]
        tasks = next(mean.tasks for mean in means if mean.length == length)
        print_table(
            console, f"{model}, mean of {tasks} tasks of RULER: {length:,} tokens", _COLUMNS, rows, no_wrap=True
        )
    cut = {(row["task"], row.get("length")): row["truncated"] for row in report.rows if row.get("truncated")}
    for (task, length), requests in cut.items():  # by every method the same
        what = "1 request" if requests == 1 else f"{requests:,} requests"
        where = task if length is None else f"{task}, {length:,} tokens"
        console.print(Words(f"{where}: {what} did not fit the model's positions and lost the prompt's start"))


def _cells(score: TaskScore | RulerMean) -> tuple[str, ...]:
    error = "" if score.stderr is None else f"{score.stderr:.4f}"
    numbers = f"{score.samples:,}", f"{score.value:.4f}", error, share_label(score.kv_read_fraction)
    return score.variant.label, budget_label(score.budget), *numbers
