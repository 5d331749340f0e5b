"""Tasks of lm-eval (LongBench, RULER, files of your own) by each method, task by task."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError
from tidaldecode.evaluate.lm_eval_there import check_lm_eval
from tidaldecode.methods.method import METHOD_KEY, Method, check_plan_names
from tidaldecode.results.cells import Cells

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from tidaldecode.evaluate.lm_eval_model import MethodLM

CELL_KEY = ("task", *METHOD_KEY)
"""Fields that tell one cell from another."""

_COMMON = ("name", "alias", "sample_len")  # of lm-eval's results: no metrics
_MOST_CHARACTERS = 300  # of somebody else's error message


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings, of which there is one for many a request and task; its errors are told."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class TaskSettings:
    """What lm-eval is told about all tasks.

    Attributes:
        names: of tasks, groups and tags; patterns with `*`.
        include_path: a folder of task files (YAML) of your own.
        limit: only the first documents of each task; `None` for all.
        num_fewshot: solved examples before each question, where the task does not forbid them; `None`: the task's own.
        chat_template: put prompts into the tokenizer's chat template.
        metadata: passed on to the tasks, such as RULER's `max_seq_lengths`.
        seed: of the choice of solved examples, and of sampling. The default is lm-eval's.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1234

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuses a chat template that there is not.

        Raises:
            InputError: the tokenizer has none.
        """
        if self.chat_template and tokenizer.chat_template is None:
            raise InputError("the model's tokenizer has no chat template: leave out --apply-chat-template")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their documents.

    Attributes:
        tasks: by name.
        digests: tell a task's rules and documents from others of the same name.
        groups: by name; lm-eval aggregates over their tasks.
    """

    tasks: dict[str, Task]
    digests: dict[str, str]
    groups: dict[str, Group]


@dataclass(frozen=True)
class LmEvalReport:
    """Scores of tasks by each method.

    Attributes:
        environment: command, versions, device.
        seconds: of this run, without loading; of a run that was taken up again only the rest.
        results: for each method's label lm-eval's `results`: by task or group, its metrics.
        rows: a cell for each task and method.
    """

    environment: dict[str, object]
    model: str
    dtype: str
    settings: TaskSettings
    seconds: float
    results: dict[str, dict[str, dict[str, Any]]]
    rows: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object; of a single method `results` is lm-eval's own."""
        settings = asdict(self.settings)
        settings.pop("include_path")  # of this machine
        return {
            **self.environment,
            "model": self.model,
            "dtype": self.dtype,
            "lm_eval": version("lm_eval"),
            "tasks": settings.pop("names"),
            **settings,
            "seconds": self.seconds,
            "results": next(iter(self.results.values())) if len(self.results) == 1 else self.results,
            "rows": list(self.rows),
        }


def find_tasks(settings: TaskSettings, known: Mapping[str, Any] | None = None) -> tuple[TaskManager, tuple[str, ...]]:
    """Looks the names up; no task is loaded.

    Args:
        known: metadata beside the settings', which come first: see `tokenizer_metadata`.

    Returns:
        lm-eval's task manager, and the names, patterns replaced by what they match.

    Raises:
        InputError: lm-eval is not installed, a name is unknown, or there is no such folder.
    """
    folder, metadata = settings.include_path, {**(known or {}), **settings.metadata}
    check_lm_eval(folder)
    from lm_eval.tasks import TaskManager

    if folder is not None:  # lm-eval reads thousands of files of its own otherwise
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        if set(settings.names) <= set(manager.all_subtasks):
            return manager, settings.names
    manager = TaskManager(include_path=folder, metadata=metadata)
    names: dict[str, None] = {}
    for name in settings.names:
        found = manager.match_tasks([name])
        if not found:
            raise InputError(_unknown(name, manager.all_tasks, folder))
        names |= dict.fromkeys(found)
    return manager, tuple(names)


def _unknown(name: str, known: Sequence[str], folder: Path | None) -> str:
    nearest = difflib.get_close_matches(name, known, n=3)
    mend = f"did you mean {' or '.join(nearest)}?" if nearest else "`lm-eval ls tasks` lists them"
    where = "" if folder is None else f" and to {folder}"
    own = "; task files of your own need --include-path DIR" if folder is None else ""
    return f"task {name!r} is unknown to lm-eval {version('lm_eval')}{where}: {mend}{own}"


@_quiet()
def load_tasks(
    manager: TaskManager, names: Sequence[str], settings: TaskSettings, config: PreTrainedConfig
) -> LoadedTasks:
    """Loads tasks with their documents, which lm-eval may have to download.

    Args:
        manager, names: see `find_tasks`.
        config: the model's.

    Raises:
        InputError: a task can't be loaded, has no documents, or asks for what is not supported: images or sound,
            running code that the model wrote, beam search, more new tokens than the model has positions.
    """
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for name in names:
        _set_seeds(settings.seed)
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever data sets, task files and their code raise
            hint = ", as one without documents" if isinstance(error, IndexError) else ""
            raise InputError(f"task {name!r} can't be loaded{hint}: {_one_line(error)}") from error
        tasks |= loaded["tasks"]
        groups |= loaded["groups"]
    for name, task in tasks.items():
        _check_documents(name, task)
        _check_task(name, task, config)
        _set_fewshot(task, settings.num_fewshot)
    digests = {name: _digest(task, settings.limit) for name, task in tasks.items()}
    return LoadedTasks(tasks, digests, groups)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."


def _check_documents(name: str, task: Task) -> None:
    try:
        first = next(iter(task.doc_iterator(limit=1)), None)
    except Exception as error:  # as one without a test or validation split does
        raise InputError(f"the documents of task {name!r} can't be read: {_one_line(error)}") from error
    if first is None:
        raise InputError(f"task {name!r} has no documents")


def _check_task(name: str, task: Task, config: PreTrainedConfig) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name!r} has images or sound, and the model reads text")
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"task {name!r} runs code that the model wrote: use lm-eval's own command for it")
    if task.OUTPUT_TYPE != "generate_until":
        return
    options = dict(normalize_gen_kwargs(task.config.generation_kwargs or {}))
    if (options.get("num_beams") or 1) > 1:
        raise InputError(f"task {name!r} asks for beam search, which tidaldecode can't decode with")
    if options["max_gen_toks"] >= config.max_position_embeddings:
        raise InputError(
            f"task {name!r} asks for up to {options['max_gen_toks']} new tokens, and the model has "
            f"{config.max_position_embeddings} positions"
        )


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    """As lm-eval does: a task that says 0 keeps it, and one that says nothing means 0."""
    own = task.get_config("num_fewshot")
    if own is None or (own != 0 and num_fewshot is not None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _digest(task: Task, limit: int | None) -> str:
    """Of the task's rules and documents; where its files lie does not count."""
    rules = {name: value for name, value in task.dump_config().items() if name not in ("metadata", "dataset_kwargs")}
    digest = hashlib.sha256(repr(task.VERSION).encode())
    for part in (rules, *(doc for _, doc in task.doc_iterator(limit=limit))):
        digest.update(json.dumps(part, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()[:16]


def _plain(value: object) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))


def _set_seeds(seed: int) -> None:
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def tokenizer_metadata(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Metadata that tells tasks which make their own documents (RULER) where the tokenizer is: a copy in a folder.

    lm-eval loads it with code that comes with it trusted; in the copy there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield {"tokenizer": folder}


def cell_identity(settings: TaskSettings, model: Mapping[str, Any]) -> dict[str, Any]:
    """What all cells of a file of results have in common.

    Args:
        model: see `tidaldecode.models.ModelFiles.identity`.
    """
    return {
        "kind": "lm-eval",
        **model,
        "lm_eval": version("lm_eval"),
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "chat_template": settings.chat_template,
        "seed": settings.seed,
    }


def finished(loaded: LoadedTasks, methods: Sequence[Method], cells: Cells) -> list[dict[str, Any]] | None:
    """What `evaluate_tasks` returns, if nothing is left to be measured: then no model is needed.

    Raises:
        InputError: one plan's name stands for another in `cells`.
    """
    check_plan_names([*cells.rows, *(method.key() for method in methods)])
    rows = [_finished_cell(loaded, name, method, cells) for name in loaded.tasks for method in methods]
    found = [row for row in rows if row is not None]
    return found if len(found) == len(rows) else None


def _finished_cell(loaded: LoadedTasks, name: str, method: Method, cells: Cells) -> dict[str, Any] | None:
    """The cell of a task as it is now: rules and documents may have changed since it was measured."""
    row = cells.find(task=name, **method.key())
    return row if row is not None and row["task_digest"] == loaded.digests[name] else None


@_quiet()
def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    loaded: LoadedTasks,
    settings: TaskSettings,
    methods: Sequence[Method],
    cells: Cells,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[dict[str, Any]]:
    """Runs each task by each method: see `tidaldecode.evaluate.lm_eval_model` for what is decoded under the method.

    Args:
        model: with a plan applied.
        tokenizer: the model's.
        methods: checked, see `check_methods`; nothing is added.
        cells: what was measured before, which is not measured again, unless the task has changed; each new cell is
            appended when it is done.
        on_progress: told how many documents of how many are done, of all tasks and methods, and in words what comes
            next.

    Returns:
        The cells of these tasks and methods, task by task: `metrics` are lm-eval's, `samples` its documents, and
        `truncated` its requests whose prompt lost its start, for it did not fit the model's positions.

    Raises:
        InputError: one plan's name stands for another in `cells`, or a task fails, as one does whose metrics can't be
            computed.
    """
    from tidaldecode.evaluate.lm_eval_model import MethodLM

    check_plan_names([*cells.rows, *(method.key() for method in methods)])
    documents = {name: sum(1 for _ in task.doc_iterator(limit=settings.limit)) for name, task in loaded.tasks.items()}
    total, done = sum(documents.values()) * len(methods), 0
    lm = MethodLM(model, tokenizer)
    for name, task in loaded.tasks.items():
        for method in methods:
            if _finished_cell(loaded, name, method, cells) is None:
                what, before, count = f"{name}: {method.label}", done, documents[name]

                def show(part: int, parts: int, what: str = what, before: int = before, count: int = count) -> None:
                    on_progress(before + count * part // parts, total, what)

                show(0, 1)
                lm.method, lm.on_request = method, show
                found = _run(lm, name, task, settings)
                cells.append({"task": name, **method.key(), "task_digest": loaded.digests[name], **found})
            done += documents[name]
    on_progress(done, total, "done")
    rows = finished(loaded, methods, cells)
    assert rows is not None
    return rows


def _run(lm: MethodLM, name: str, task: Task, settings: TaskSettings) -> dict[str, Any]:
    """One task by the method that `lm` has.

    Raises:
        InputError: it fails.
    """
    from lm_eval.evaluator import evaluate

    began = time.perf_counter()
    _set_seeds(settings.seed)
    task.set_fewshot_seed(settings.seed)
    lm.truncated = 0
    try:
        found = evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}},
            limit=settings.limit,
            log_samples=False,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
        )["results"][name]
    except torch.OutOfMemoryError:  # no fault of the task's
        raise
    except Exception as error:  # whatever its prompts, filters and metrics raise
        raise InputError(f"task {name!r} by {lm.method.label} failed: {_one_line(error)}") from error
    return {
        "alias": found["alias"],
        "samples": found["sample_len"],
        "truncated": lm.truncated,
        "metrics": {metric: _number(value) for metric, value in found.items() if metric not in _COMMON},
        "seconds": round(time.perf_counter() - began, 3),
    }


def _number(value: Any) -> float | int | str | None:
    """A metric as JSON holds it; one that is not finite becomes `None`."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str) else str(value)


@_quiet()
def results_by_method(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[Method], loaded: LoadedTasks
) -> dict[str, dict[str, dict[str, Any]]]:
    """lm-eval's `results` for each method's label: tasks, and groups with what lm-eval aggregates over their tasks.

    Args:
        rows: see `evaluate_tasks`.
    """
    from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

    results = {}
    for method in methods:
        metrics = {
            row["task"]: {
                "name": row["task"],
                "alias": row["alias"],
                "sample_len": row["samples"],
                **_with_nan(row["metrics"]),
            }
            for row in rows
            if {name: row[name] for name in METHOD_KEY} == method.key()
        }
        found = aggregate_groups(EvalAcc(metrics=metrics, groups=loaded.groups)).collect()[0]
        results[method.label] = {name: _with_none_for_nan(scores) for name, scores in found.items()}
    return results


def _with_nan(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """For lm-eval to compute with: a group over a score that is not finite has none that is."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _with_none_for_nan(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in scores.items()
    }
