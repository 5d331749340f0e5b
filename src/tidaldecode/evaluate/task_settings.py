"""What lm-eval is told about all tasks, as options of a command."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tidaldecode.errors import InputError
from tidaldecode.evaluate.method_options import MethodOptions, Names
from tidaldecode.methods.method import METHODS
from tidaldecode.options import Option, integers, names, names_of
from tidaldecode.texts.prompt import Prompt
from tidaldecode.texts.text import Haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def _metadata(option: str, text: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise InputError(f'{option} {text!r} is no JSON object: give one such as {{"max_seq_lengths": "4k"}}')
    return metadata


@dataclass(frozen=True)
class RulerOptions:
    """What RULER's tasks are made of.

    Raises:
        InputError: a file is missing.
    """

    haystack: Haystack = field(default_factory=Haystack)
    lengths: Annotated[
        tuple[int, ...], Option("Of RULER: tokens of a prompt and its answer.", metavar="N,...", parse=integers)
    ] = (4096,)
    squad: Annotated[Path | None, Option("Of RULER: dev-v2.0.json of SQuAD.", metavar="F")] = None
    hotpot: Annotated[Path | None, Option("Of RULER: hotpot_dev_distractor_v1.json.", metavar="F")] = None

    def __post_init__(self) -> None:
        if self.haystack.text is not None:
            self.haystack.parts()
        for option, path in {"--squad": self.squad, "--hotpot": self.hotpot}.items():
            if path is not None and not os.path.isfile(path):
                raise InputError(f"{option} {path} is no file")


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks, how many of their documents, and how they are asked; the seed's default is lm-eval's.

    Raises:
        InputError: lm-eval is not installed, or there is no such folder.
    """

    names: Annotated[
        Names, Option("Tasks, groups, tags, patterns with *.", name="--tasks", metavar="T,...", parse=names)
    ]
    include_path: Annotated[Path | None, Option("Folder of task files (YAML) of your own.", metavar="DIR")] = None
    ruler: RulerOptions = field(default_factory=RulerOptions)
    longbench: Annotated[Path | None, Option("Folder of LongBench's JSONL files.", metavar="DIR")] = None
    limit: Annotated[int | None, Option("First documents of each task (and length).", min=1)] = None
    num_fewshot: Annotated[int | None, Option("Solved examples before each question.", min=0)] = None
    chat_template: Annotated[
        bool, Option("Put prompts into the tokenizer's chat template.", name="--apply-chat-template")
    ] = False
    metadata: Annotated[
        Mapping[str, Any] | None,
        Option('Passed on to tasks, such as {"max_seq_lengths": "4k"}.', metavar="JSON", parse=_metadata),
    ] = None
    seed: Annotated[int, Option("Seed of everything random.", min=0, max=2**63 - 1)] = 1234

    def __post_init__(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("lm-eval is not installed: pip install 'tidaldecode[eval]'")
        if self.include_path is not None and not os.path.isdir(self.include_path):
            raise InputError(f"--include-path {self.include_path} is no folder: give one with task files (YAML)")
        if self.longbench is not None and not os.path.isdir(self.longbench):
            raise InputError(f"--longbench {self.longbench} is no folder: give that of LongBench's JSONL files")

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuses a chat template that there is not.

        Raises:
            InputError: the tokenizer has none.
        """
        if self.chat_template and tokenizer.chat_template is None:
            raise InputError("the model's tokenizer has no chat template: leave out --apply-chat-template")

    def tokens_around(self, tokenizer: Tokenizer) -> int:
        """Tokens that the chat template, if it is wanted, puts around a prompt."""
        return len(Prompt("").token_ids(tokenizer)) if self.chat_template else 0


@dataclass(frozen=True)
class TaskMethods(MethodOptions):
    """As of the other studies; only the named methods run."""

    method: Annotated[
        Names, Option(f"Of {', '.join(METHODS)}. Only these run.", metavar="M,...", parse=names_of(*METHODS))
    ] = ("full", "tidal")
