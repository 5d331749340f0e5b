"""The rows of `eval lm-eval`: a cell for each task and method, and its metrics one by one."""

from __future__ import annotations

from collections.abc import Iterable

from tidaldecode.results.rows import Count, Fields, MethodRow, Name, Number


class TaskRow(MethodRow):
    """One task by one method.

    Attributes:
        task_digest: tells the task's rules and documents from others of the same name.
        alias: lm-eval's name of it for tables.
        samples: documents.
        truncated: requests whose prompt lost its start, for it did not fit the model's positions.
        metrics: lm-eval's, such as `acc,none`; `None` where it is not finite.
    """

    task: Name
    task_digest: Name | None = None
    alias: str | None = None
    samples: Count
    truncated: Count | None = None
    metrics: dict[Name, Number | str | None]
    seconds: Number | None = None


class TaskScore(MethodRow):
    """One metric of a task by one method.

    Attributes:
        metric: lm-eval's name of it, such as `acc,none`.
        stderr: standard error, `None` where lm-eval gives none.
        samples: documents of the task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


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
