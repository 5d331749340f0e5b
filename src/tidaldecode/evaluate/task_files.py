"""Tasks of lm-eval (LongBench, RULER, files of your own): looked up, loaded and checked before a model is."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError, one_line
from tidaldecode.evaluate import ruler, study
from tidaldecode.evaluate.local_tasks import LocalTasks
from tidaldecode.evaluate.study import OnProgress
from tidaldecode.evaluate.task_settings import TaskSettings

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class LoadedTask:
    """A task with its documents.

    Attributes:
        length: of RULER's, tokens of a prompt and its answer; `None` of others.
        digest: tells its rules and documents from others of the same name.
        documents: how many, within the limit.
    """

    name: str
    length: int | None
    task: Task
    digest: str
    documents: int

    @property
    def label(self) -> str:
        """The name, and the length where there is one."""
        return self.name if self.length is None else f"{self.name}, {self.length:,} tokens"


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks, and the groups that lm-eval aggregates over.

    Attributes:
        tasks: by their labels.
        groups: by length, which is `None` but for RULER, and name.
        left_out: names of a group's tasks that can't be made of what was given, and why.
    """

    tasks: dict[str, LoadedTask]
    groups: dict[int | None, dict[str, Group]]
    left_out: dict[str, str]


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's warnings, of which there is one for many a request and task; its errors are told."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def find_tasks(settings: TaskSettings) -> tuple[TaskManager, tuple[str, ...]]:
    """Looks the names up; no task is loaded.

    Returns:
        lm-eval's task manager, and the names, patterns replaced by what they match.

    Raises:
        InputError: a name is unknown.
    """
    from lm_eval.tasks import TaskManager

    folder, metadata = settings.include_path, dict(settings.metadata or {})
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
    nearest = [f"ruler_{name}"] if f"ruler_{name}" in known else difflib.get_close_matches(name, known, n=3)
    mend = f"did you mean {' or '.join(nearest)}?" if nearest else "`lm-eval ls tasks` lists them"
    where = "" if folder is None else f" and to {folder}"
    own = "; task files of your own need --include-path DIR" if folder is None else ""
    return f"task {name!r} is unknown to lm-eval {version('lm_eval')}{where}: {mend}{own}"


@quiet()
def load_tasks(
    manager: TaskManager,
    names: Sequence[str],
    settings: TaskSettings,
    config: PreTrainedConfig,
    tokenizer: Tokenizer,
    on_progress: OnProgress = study.quiet,
) -> LoadedTasks:
    """Loads tasks with their documents: see `LocalTasks` for which are of this machine; lm-eval may download others.

    Args:
        manager, names: see `find_tasks`.
        config, tokenizer: the model's.

    Raises:
        InputError: a task can't be loaded, has no documents, or asks for what is not supported: images or sound,
            running code that the model wrote, beam search, more new tokens than the model has positions.
    """
    local = LocalTasks(manager, settings, config, tokenizer)
    local.check_used(names)
    tasks: dict[str, LoadedTask] = {}
    groups: dict[int | None, dict[str, Group]] = {}
    for name in names:
        for length in local.lengths(name):
            local.make(name, length, on_progress)
            set_seed(settings.seed % 2**32)
            try:
                loaded = manager.load([name])
            except Exception as error:  # whatever data sets, task files and their code raise
                hint = ", as one without documents" if isinstance(error, IndexError) else ""
                raise InputError(f"task {name!r} can't be loaded{hint}: {one_line(error)}") from error
            for leaf, task in loaded["tasks"].items():
                found = _checked(leaf, length if leaf in ruler.TASKS else None, task, settings, config)
                tasks[found.label] = found
            groups.setdefault(length, {}).update(loaded["groups"])
    return LoadedTasks(tasks, groups, local.left_out)


def _checked(name: str, length: int | None, task: Task, settings: TaskSettings, config: PreTrainedConfig) -> LoadedTask:
    try:
        first = next(iter(task.doc_iterator(limit=1)), None)
    except Exception as error:  # as one without a test or validation split does
        raise InputError(f"the documents of task {name!r} can't be read: {one_line(error)}") from error
    if first is None:
        raise InputError(f"task {name!r} has no documents")
    _check_demands(name, task, config)
    own = task.get_config("num_fewshot")
    if own is None or (own != 0 and settings.num_fewshot is not None):  # as lm-eval does: a task that says 0 keeps it
        task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
    return LoadedTask(name, length, task, *_digest(task, settings.limit))


def _check_demands(name: str, task: Task, config: PreTrainedConfig) -> None:
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


def _digest(task: Task, limit: int | None) -> tuple[str, int]:
    """Of the task's rules and documents, and how many there are; where its files lie does not count."""
    rules = {name: value for name, value in task.dump_config().items() if name not in ("metadata", "dataset_kwargs")}
    digest = hashlib.sha256(repr(task.VERSION).encode())
    parts = [rules, *(doc for _, doc in task.doc_iterator(limit=limit))]
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()[:16], len(parts) - 1


def _plain(value: object) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))
