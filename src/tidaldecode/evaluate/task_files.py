"""Tasks of lm-eval (LongBench, RULER, files of your own): looked up, loaded and checked before a model is."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError, one_line
from tidaldecode.evaluate.task_settings import TaskSettings

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class LoadedTask:
    """A task with its documents.

    Attributes:
        digest: tells its rules and documents from others of the same name.
        documents: how many, within the limit.
    """

    task: Task
    digest: str
    documents: int


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks by name, and the groups that lm-eval aggregates over."""

    tasks: dict[str, LoadedTask]
    groups: dict[str, Group]


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


def find_tasks(settings: TaskSettings, known: Mapping[str, Any] | None = None) -> tuple[TaskManager, tuple[str, ...]]:
    """Looks the names up; no task is loaded.

    Args:
        known: metadata beside the settings', which come first: see `tokenizer_metadata`.

    Returns:
        lm-eval's task manager, and the names, patterns replaced by what they match.

    Raises:
        InputError: a name is unknown.
    """
    from lm_eval.tasks import TaskManager

    folder, metadata = settings.include_path, {**(known or {}), **(settings.metadata or {})}
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


@quiet()
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
        set_seed(settings.seed % 2**32)
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever data sets, task files and their code raise
            hint = ", as one without documents" if isinstance(error, IndexError) else ""
            raise InputError(f"task {name!r} can't be loaded{hint}: {one_line(error)}") from error
        tasks |= loaded["tasks"]
        groups |= loaded["groups"]
    return LoadedTasks({name: _checked(name, task, settings, config) for name, task in tasks.items()}, groups)


def _checked(name: str, task: Task, settings: TaskSettings, config: PreTrainedConfig) -> LoadedTask:
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
    return LoadedTask(task, *_digest(task, settings.limit))


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


@contextmanager
def tokenizer_metadata(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Metadata that tells tasks which make their own documents (RULER) where the tokenizer is: a copy in a folder.

    lm-eval loads it with code that comes with it trusted; in the copy there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield {"tokenizer": folder}
