"""Tasks of lm-eval by each method, task by task.

They run by `lm_eval.evaluator.evaluate`, the part of `simple_evaluate` that measures: the whole also asks the machine
for all its versions, which takes five seconds, and would do so for every task and method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError, one_line
from tidaldecode.evaluate.study import Case, OnProgress, Study
from tidaldecode.evaluate.task_files import LoadedTasks, find_tasks, load_tasks, quiet, tokenizer_metadata
from tidaldecode.evaluate.task_settings import TaskMethods, TaskSettings
from tidaldecode.methods.method import METHOD_KEY, Method
from tidaldecode.models import ChosenModel
from tidaldecode.results.rows import Fields
from tidaldecode.results.tasks import TaskRow

if TYPE_CHECKING:
    from tidaldecode.evaluate.lm_eval_model import MethodLM

_COMMON = ("name", "alias", "sample_len")  # of lm-eval's results: no metrics


def tasks(tokenizer: Tokenizer, loaded: LoadedTasks, settings: TaskSettings, methods: Sequence[Method]) -> Study:
    """Each task by each method: see `tidaldecode.evaluate.lm_eval_model` for what is decoded under the method.

    Its rows are the cells, task by task. A task whose rules or documents have changed is measured again.

    Args:
        tokenizer: the model's.
        methods: checked, see `check_methods`; nothing is added.
    """
    common = {name: getattr(settings, name) for name in ("limit", "num_fewshot", "chat_template", "seed")}
    common["lm_eval"] = version("lm_eval")
    about = {"tasks": settings.names, "metadata": settings.metadata or {}, **common}
    return Study(
        row=TaskRow,
        key=("task", *METHOD_KEY),
        identity={"kind": "lm-eval", **common},
        cases=[
            Case({"task": name}, name, found.task, found.documents, {"task_digest": found.digest})
            for name, found in loaded.tasks.items()
        ],
        ways=methods,
        start=partial(_start, tokenizer),
        measure=partial(_measure, settings),
        summary=lambda cells: cells,
        to_json=lambda rows: {**about, "results": _results(rows, methods, loaded), "rows": list(rows)},
    )


def tasks_of(settings: TaskSettings, methods: TaskMethods, chosen: ChosenModel, on_progress: OnProgress) -> Study:
    """The study of tasks that are not found and a model that is not loaded yet."""
    given = methods.checked(chosen.config, chosen.config.max_position_embeddings)
    tokenizer = chosen.files.tokenizer()
    settings.check(tokenizer)
    on_progress(0, 0, "loading the tasks")
    with tokenizer_metadata(tokenizer) as known:
        loaded = load_tasks(*find_tasks(settings, known), settings, chosen.config)
    return tasks(tokenizer, loaded, settings, given)


@quiet()
def _start(tokenizer: Tokenizer, model: PreTrainedModel) -> MethodLM:
    from tidaldecode.evaluate.lm_eval_model import MethodLM

    return MethodLM(model, tokenizer)


@quiet()
def _measure(
    settings: TaskSettings,
    lm: MethodLM,
    case: Case,
    method: Method,
    full: Fields | None,
    on_part: Callable[[float], None],
) -> Fields:
    """One task by one method.

    Raises:
        InputError: it fails, as one does whose metrics can't be computed.
    """
    from lm_eval.evaluator import evaluate

    began = time.perf_counter()
    lm.method, lm.truncated = method, 0
    lm.on_request = lambda done, total: on_part(done / total)
    set_seed(settings.seed % 2**32)
    case.what.set_fewshot_seed(settings.seed)
    try:
        found = evaluate(
            lm=lm,
            task_dict={"tasks": {case.label: case.what}, "groups": {}},
            limit=settings.limit,
            log_samples=False,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
        )["results"][case.label]
    except torch.OutOfMemoryError:  # no fault of the task's
        raise
    except Exception as error:  # whatever its prompts, filters and metrics raise
        raise InputError(f"task {case.label!r} by {method.label} failed: {one_line(error)}") from error
    return {
        "alias": found["alias"],
        "samples": found["sample_len"],
        "truncated": lm.truncated,
        "metrics": {metric: _finite(value) for metric, value in found.items() if metric not in _COMMON},
        "seconds": round(time.perf_counter() - began, 3),
    }


@quiet()
def _results(rows: Sequence[Fields], methods: Sequence[Method], loaded: LoadedTasks) -> dict[str, Any]:
    """lm-eval's `results`, tasks and groups, of a single method; else those of each method's label."""
    from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

    results = {}
    for method in methods:
        own = [row for row in rows if {name: row[name] for name in METHOD_KEY} == method.key()]
        metrics = {row["task"]: _as_lm_eval_says(row) for row in own}
        found = aggregate_groups(EvalAcc(metrics=metrics, groups=loaded.groups)).collect()[0]
        results[method.label] = {
            name: {metric: _finite(value) for metric, value in scores.items()} for name, scores in found.items()
        }
    return next(iter(results.values())) if len(results) == 1 else results


def _as_lm_eval_says(row: Fields) -> dict[str, Any]:
    """For lm-eval to compute with: a group over a score that is not finite has none that is."""
    metrics = {name: math.nan if value is None else value for name, value in row["metrics"].items()}
    return {"name": row["task"], "alias": row["alias"], "sample_len": row["samples"], **metrics}


def _finite(value: Any) -> Any:
    """A metric as JSON holds it; one that is not finite becomes `None`."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str | None) else str(value)
