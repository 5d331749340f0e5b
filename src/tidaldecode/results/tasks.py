"""The rows of `eval lm-eval`: a cell for each task and method, and its metrics one by one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from tidaldecode.results.rows import Count, Fields, MethodRow, Name, Number, Positive, by_method, mean_read


class TaskRow(MethodRow):
    """One task by one method.

    Attributes:
        length: of RULER's tasks, tokens of a prompt and its answer.
        task_digest: tells the task's rules and documents from others of the same name.
        alias: lm-eval's name of it for tables.
        samples: documents.
        truncated: requests whose prompt lost its start, for it did not fit the model's positions.
        metrics: lm-eval's, such as `acc,none`; `None` where it is not finite.
    """

    task: Name
    length: Positive | None = None
    task_digest: Name | None = None
    alias: str | None = None
    samples: Count
    truncated: Count | None = None
    metrics: dict[Name, Number | str | None]
    seconds: Number | None = None


class TaskScore(MethodRow):
    """One metric of a task by one method.

    Attributes:
        length: of RULER's tasks.
        metric: lm-eval's name of it, such as `acc,none`.
        stderr: standard error, `None` where lm-eval gives none.
        samples: documents of the task.
    """

    task: str
    length: int | None = None
    metric: str
    value: float
    stderr: float | None
    samples: int


class RulerMean(MethodRow):
    """RULER's tasks of one length by one method; each task counts the same.

    Attributes:
        tasks: how many.
        value: mean of their scores, 0 to 1.
        stderr: its standard error, `None` where a task's is not known.
        samples: documents of all tasks.
    """

    length: int
    tasks: int
    value: float
    stderr: float | None
    samples: int


def ruler_means(rows: Iterable[Fields]) -> list[RulerMean]:
    """Of each length, method and budget; none of a single task."""
    of_length: dict[int, list[Fields]] = {}
    for row in rows:
        if row.get("length") is not None:
            of_length.setdefault(row["length"], []).append(row)
    return [
        _ruler_mean(method, length, own)
        for length, found in of_length.items()
        for method, own in by_method(found)
        if len(own) > 1
    ]


def _ruler_mean(method: Fields, length: int, rows: list[Fields]) -> RulerMean:
    metric = f"{length},none"
    errors = [_stderr_of(metric, row) for row in rows]
    known = [error for error in errors if error is not None]
    return RulerMean.model_construct(
        **method,
        length=length,
        tasks=len(rows),
        value=statistics.fmean(row["metrics"][metric] for row in rows),
        stderr=math.hypot(*known) / len(rows) if len(known) == len(rows) else None,
        samples=sum(row["samples"] for row in rows),
        kv_read_fraction=mean_read(rows),
    )


def lm_eval_summary(rows: Iterable[Fields]) -> list[TaskScore]:
    """Every metric of every task, method and budget, standard errors beside what they are of."""
    return [
        TaskScore.model_construct(**{**row, "metric": metric, "value": value, "stderr": _stderr_of(metric, row)})
        for row in rows
        for metric, value in row["metrics"].items()
        if isinstance(value, int | float) and "_stderr" not in metric
    ]


def _stderr_of(metric: str, row: Fields) -> float | None:
    """`acc,none` has its standard error in `acc_stderr,none`; where lm-eval has none it says "N/A"."""
    name, comma, filter_name = metric.partition(",")
    value = row["metrics"].get(f"{name}_stderr{comma}{filter_name}")
    return value if isinstance(value, int | float) else None
