"""RULER's and LongBench's tasks over documents of this machine, in lm-eval's index, where groups and tags find them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError, one_line
from tidaldecode.evaluate import longbench, ruler
from tidaldecode.evaluate.study import OnProgress
from tidaldecode.evaluate.task_settings import RulerOptions, TaskSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Make = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Of a task's rules, as lm-eval has them, those with documents of this machine."""


class LocalTasks:
    """Puts documents of this machine in the place of those that lm-eval would download.

    Args:
        manager: lm-eval's; its index is changed.
        config, tokenizer: the model's.

    Attributes:
        left_out: names of RULER's tasks that can't be made of what was given, and why.
    """

    def __init__(
        self, manager: TaskManager, settings: TaskSettings, config: PreTrainedConfig, tokenizer: Tokenizer
    ) -> None:
        around, positions = settings.tokens_around(tokenizer), config.max_position_embeddings
        self._index, self._settings = manager.task_index, settings
        self._ruler = ruler.Ruler(settings.ruler, tokenizer, positions, settings.limit, settings.seed, around)
        self._rules: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}

    def check_used(self, names: Sequence[str]) -> None:
        """Refuses options of tasks that are not named.

        Raises:
            InputError: there are some.
        """
        leaves, longbench_folder = [leaf for name in names for leaf in self._leaves(name)], self._settings.longbench
        if self._settings.ruler != RulerOptions() and not any(leaf in ruler.TASKS for leaf in leaves):
            raise InputError(
                "--haystack, --lengths, --squad and --hotpot are for RULER's tasks, and none is named: add one to "
                "--tasks, such as ruler, or leave them out"
            )
        if longbench_folder is not None and not any(leaf.startswith(longbench.PREFIX) for leaf in leaves):
            raise InputError(
                f"--longbench {longbench_folder} is for LongBench's tasks, and none is named: add one to --tasks, such "
                "as longbench_qasper, or leave it out"
            )

    def lengths(self, name: str) -> tuple[int | None, ...]:
        """The lengths that a task, group or tag is made of; `None` where there is nothing of RULER in it.

        Raises:
            InputError: they were given in another way.
        """
        if not any(leaf in ruler.TASKS for leaf in self._leaves(name)):
            return (None,)
        if "max_seq_lengths" in (self._settings.metadata or {}):
            raise InputError("--metadata max_seq_lengths: RULER's lengths are those of --lengths, such as 4096,8192")
        self._ruler.check_lengths()
        return self._settings.ruler.lengths

    def make(self, name: str, length: int | None, on_progress: OnProgress) -> None:
        """Makes, or reads, the documents of a task, or of all tasks of a group or tag.

        Args:
            length: of RULER's.

        Raises:
            InputError: they can't be made, or are not there.
        """
        if length is not None and name == ruler.GROUP:
            self._fit_group(length)
        for leaf in self._leaves(name):
            if length is not None and leaf in ruler.TASKS:
                on_progress(0, 0, f"making {leaf}, {length:,} tokens")
                self._replace(leaf, partial(self._ruler.task, leaf, length))
            elif self._settings.longbench is not None and leaf.startswith(longbench.PREFIX):
                on_progress(0, 0, f"reading {leaf}")
                self._replace(leaf, partial(longbench.task, self._settings.longbench, leaf, self._settings.limit))

    def _fit_group(self, length: int) -> None:
        """The group of RULER: its mean is over the tasks that can be made, at this length."""
        self.left_out = self._ruler.left_out()
        rules = {
            "group": ruler.GROUP,
            "task": [name for name in ruler.TASKS if name not in self.left_out],
            "aggregate_metric_list": [{"metric": str(length), "weight_by_size": False}],
        }
        self._index[ruler.GROUP] = replace(self._index[ruler.GROUP], yaml_path=None, cfg=rules)

    def _leaves(self, name: str) -> Iterator[str]:
        """The tasks of a task's, group's or tag's name, as far as they have names of their own."""
        entry = self._index.get(name)
        children = (entry.cfg or {}).get("task") if entry is not None else None
        if entry is not None and entry.cfg is None and entry.tags:
            children = sorted(entry.tags)
        if not isinstance(children, list):
            yield name
            return
        for child in children:
            found = child if isinstance(child, str) else child.get("task", child.get("group"))
            if isinstance(found, str) and found != name:
                yield from self._leaves(found)

    def _replace(self, leaf: str, make: Make) -> None:
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self._index[leaf]
        if leaf not in self._rules:
            if leaf in ruler.TASKS:
                ruler.import_generators()  # what the rules name would fetch data else, when it is imported
            try:
                with warnings.catch_warnings(action="ignore"):  # of packages that the metrics take
                    self._rules[leaf] = load_yaml(entry.yaml_path)
            except ImportError as error:
                raise InputError(
                    f"task {leaf!r} needs more packages ({one_line(error)}): pip install 'tidaldecode[eval]'"
                ) from None
        self._index[leaf] = replace(entry, yaml_path=None, cfg=make(self._rules[leaf]))
