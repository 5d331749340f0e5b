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
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError, one_line
from tidaldecode.evaluate.study import Case, OnProgress, Study
from tidaldecode.evaluate.task_files import LoadedTasks, find_tasks, load_tasks, quiet
from tidaldecode.evaluate.task_settings import TaskMethods, TaskSettings
from tidaldecode.methods.method import METHOD_KEY, Method
from tidaldecode.models import ChosenModel
from tidaldecode.results.rows import Fields
from tidaldecode.results.tasks import TaskRow, ruler_means

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
    about = {"tasks": settings.names, "metadata": settings.metadata or {}, **common, **_sources(settings, loaded)}
    return Study(
        row=TaskRow,
        key=("task", "length", *METHOD_KEY),
        identity={"kind": "lm-eval", **common},
        cases=[
            Case(
                {"task": found.name, "length": found.length},
                label,
                found.task,
                found.documents,
                {"task_digest": found.digest},
            )
            for label, found in loaded.tasks.items()
        ],
        ways=methods,
        start=partial(_start, tokenizer),
        measure=partial(_measure, settings),
        summary=lambda cells: cells,
        to_json=lambda rows: {
            **about,
            "results": _results(rows, methods, loaded),
            "ruler_means": [mean.model_dump() for mean in ruler_means(rows)],
            "rows": list(rows),
        },
    )


def tasks_of(settings: TaskSettings, methods: TaskMethods, chosen: ChosenModel, on_progress: OnProgress) -> Study:
    """The study of tasks that are not found and a model that is not loaded yet."""
    given = methods.checked(chosen.config, chosen.config.max_position_embeddings)
    tokenizer = chosen.files.tokenizer()
    settings.check(tokenizer)
    on_progress(0, 0, "loading the tasks")
    loaded = load_tasks(*find_tasks(settings), settings, chosen.config, tokenizer, on_progress)
    return tasks(tokenizer, loaded, settings, given)


def _sources(settings: TaskSettings, loaded: LoadedTasks) -> dict[str, Any]:
    """What RULER's tasks were made of, where there are some."""
    if not any(found.length for found in loaded.tasks.values()):
        return {}
    haystack, lengths = settings.ruler.haystack.title, settings.ruler.lengths
    return {"haystack": haystack, "lengths": lengths, "left_out": loaded.left_out}


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
    lm.start(method)
    lm.on_request = lambda done, total: on_part(done / total)
    set_seed(settings.seed % 2**32)
    case.what.set_fewshot_seed(settings.seed)
    try:
        with patch("lm_eval.api.task.tqdm", partial(tqdm, disable=True)):  # `on_part` has a bar
            found = evaluate(
                lm=lm,
                task_dict={"tasks": {case.key["task"]: case.what}, "groups": {}},
                limit=settings.limit,
                log_samples=False,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )["results"][case.key["task"]]
    except torch.OutOfMemoryError:  # no fault of the task's
        raise
    except Exception as error:  # whatever its prompts, filters and metrics raise
        raise InputError(f"task {case.label!r} by {method.label} failed: {one_line(error)}") from error
    return {
        "alias": found["alias"],
        "samples": found["sample_len"],
        "truncated": lm.truncated,
        "kv_read_fraction": lm.kv_read_fraction,
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
        all_lengths: dict[str, dict[str, Any]] = {}
        for length, groups in loaded.groups.items():
            metrics = {row["task"]: _as_lm_eval_says(row) for row in own if row["length"] == length}
            for name, scores in aggregate_groups(EvalAcc(metrics=metrics, groups=groups)).collect()[0].items():
                all_lengths.setdefault(name, {}).update((metric, _finite(value)) for metric, value in scores.items())
        results[method.label] = all_lengths
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
