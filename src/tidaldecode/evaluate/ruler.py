"""RULER (Hsieh et al. 2024) without a network: lm-eval's own generators over a text of this machine.

What they would download is put in their place: the haystack, the questions, the tokenizer, and NLTK's splitter of
sentences, here the untrained one, which decides between which sentences of the haystack a needle can lie.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import set_seed

from tidaldecode.errors import InputError, one_line
from tidaldecode.evaluate.task_settings import RulerOptions
from tidaldecode.text_file import read_text

GROUP = "ruler"

_PACKAGE = "lm_eval.tasks.ruler"

_NEEDLES = "single_1 single_2 single_3 multikey_1 multikey_2 multikey_3 multiquery multivalue".split()
_MADE_BY = {
    **{f"niah_{name}": ("niah_utils", f"niah_{name}", "generate_samples") for name in _NEEDLES},
    "ruler_vt": ("vt_utils", "get_vt_dataset", "sys_vartrack_w_noise_random"),
    "ruler_cwe": ("cwe_utils", "get_cw_dataset", "sys_word_pair_random"),
    "ruler_fwe": ("fwe_utils", "fwe_download", "sys_kwext"),
    "ruler_qa_squad": ("qa_utils", "get_squad", "generate_samples"),
    "ruler_qa_hotpot": ("qa_utils", "get_hotpotqa", "generate_samples"),
}  # module of lm-eval, what makes the data set there, and what makes the documents of one length

TASKS = tuple(_MADE_BY)
"""lm-eval's names of them."""

_DOCUMENTS = 500  # of a task and length, as lm-eval and RULER have it
_ROOM = 128  # tokens of a prompt's last words, and of answers, that generators do not count
_SOLVED = 500  # most tokens of the solved example before a question of ruler_vt
_SPREAD = 60  # tokens by which a prompt may be longer than another one of as many words


@dataclass(frozen=True)
class Ruler:
    """Makes documents of the tasks.

    Args:
        options: which text and questions.
        tokenizer: counts a prompt's tokens.
        positions: the model's.
        limit: most documents of a task and length.
        seed: a document depends on it, its task, its length and its number alone.
        around: tokens that a chat template puts around a prompt.
    """

    options: RulerOptions
    tokenizer: Tokenizer
    positions: int
    limit: int | None
    seed: int
    around: int = 0

    def left_out(self) -> dict[str, str]:
        """Names of tasks whose questions were not given, and why they can't be made."""
        needed = {
            "ruler_qa_squad": (self.options.squad, "--squad dev-v2.0.json"),
            "ruler_qa_hotpot": (self.options.hotpot, "--hotpot hotpot_dev_distractor_v1.json"),
        }
        why = "its questions are published ones, and no network is asked: give {}, as downloaded"
        return {name: why.format(mend) for name, (path, mend) in needed.items() if path is None}

    def check_lengths(self) -> None:
        """Refuses lengths beyond the model's positions.

        Raises:
            InputError: one is.
        """
        longest = max(self.options.lengths)
        if longest > self.positions:
            raise InputError(
                f"--lengths {longest}: prompts and answers of {longest} tokens are beyond the model's {self.positions} "
                "positions"
            )

    def task(self, name: str, length: int, rules: Mapping[str, Any]) -> dict[str, Any]:
        """A task's rules, as lm-eval has them, with documents of one length, and that length's metric alone.

        Raises:
            InputError: they can't be made.
        """
        documents, score, metric = self._documents(name, length), rules["process_results"], str(length)

        def at_length(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
            return {metric: score(document, answers)[str(document["max_length"])]}

        return {
            **rules,
            "custom_dataset": lambda **_: {"test": documents},
            "process_results": at_length,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        }

    def _documents(self, name: str, length: int) -> Any:
        """A data set of lm-eval's fields: input, outputs, gen_prefix, ..."""
        module_name, make, generate = _MADE_BY[name]
        import_generators()
        module, tokens = import_module(f"{_PACKAGE}.{module_name}"), self._fitting(length)
        self._check_length(name, module, tokens)
        own: dict[str, Any] = {"get_tokenizer": lambda *_: self._tokenize, generate: self._few(module, generate)}
        if module_name != "niah_utils":
            own["tqdm"] = _no_bar
        else:
            own["get_haystack"] = partial(self._haystack, module.get_haystack)
        if module_name == "cwe_utils":
            own["RNG"] = random.Random(self.seed)
        if name in ("ruler_qa_squad", "ruler_qa_hotpot"):
            own |= self._questions(module, name)
        set_seed(self.seed % 2**32)
        try:
            with patch.multiple(module, **own), contextlib.redirect_stdout(io.StringIO()):
                return getattr(module, make)(max_seq_lengths=[tokens])["test"]
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"--lengths {length} is too short for {name}: no prompt fits") from error
        except Exception as error:  # whatever else lm-eval's generators raise
            raise InputError(f"{name} of {length} tokens can't be made: {one_line(error)}") from error

    def _fitting(self, length: int) -> int:
        """Tokens for the generators, less what they do not count where that would not fit."""
        return min(length, self.positions - _ROOM - self.around)

    @cached_property
    def _words(self) -> list[str]:
        return " ".join(self.options.haystack.parts()).split()

    @cached_property
    def _haystack_tokens(self) -> int:
        return self._count(" ".join(self._words))

    def _tokenize(self, text: str) -> Any:
        return self.tokenizer(text, verbose=False)

    def _count(self, text: str) -> int:
        return len(self._tokenize(text)["input_ids"])

    def _haystack(self, own: Callable[..., Any], type_haystack: str) -> Any:
        """lm-eval's haystack, or the given text's words in place of the essays that it downloads."""
        if type_haystack != "essay":
            return own(type_haystack=type_haystack)
        tokens = self._fitting(max(self.options.lengths))  # told before shorter ones are made
        if self._haystack_tokens < tokens:
            raise InputError(
                f"the haystack has {self._haystack_tokens} tokens, {tokens - self._haystack_tokens} too few for "
                f"prompts of {tokens}: give a longer --haystack, or shorter --lengths"
            )
        return self._words

    def _few(self, module: ModuleType, generate: str) -> Callable[..., list[dict[str, Any]]]:
        """lm-eval's generator, for as many documents as are wanted and questions are there."""
        original = getattr(module, generate)

        def few(*arguments: Any, num_samples: int = _DOCUMENTS, **options: Any) -> list[dict[str, Any]]:
            wanted = min(num_samples, self.limit or _DOCUMENTS, len(options.get("qas", range(num_samples))))
            made: list[dict[str, Any]] = original(*arguments, num_samples=wanted, **options)
            return made

        return few

    def _questions(self, module: ModuleType, name: str) -> dict[str, Any]:
        """lm-eval's readers of SQuAD and HotpotQA, from the file."""
        reader, option = ("read_squad", "squad") if name == "ruler_qa_squad" else ("read_hotpotqa", "hotpot")
        path: Path | None = getattr(self.options, option)
        if path is None:
            raise InputError(f"{name} can't be made: {self.left_out()[name]}")
        try:
            with patch.object(module, "download_json", lambda url: json.loads(read_text(f"--{option}", path))):
                questions, documents = getattr(module, reader).__wrapped__()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"--{option} {path} is not the file that {name} is made of: {type(error).__name__} {one_line(error)}"
            ) from error
        if not questions:
            raise InputError(f"--{option} {path} has no questions with an answer")
        return {reader: lambda: (questions, documents)}

    def _check_length(self, name: str, module: ModuleType, tokens: int) -> None:
        """Refuses a length at which lm-eval's generator would try for ever."""
        least = 0
        if name == "ruler_vt":
            solved = self._count(module.generate_input_output(5, 1, 4, is_icl=True)[0]) + 30
            if solved + _SPREAD > _SOLVED:
                raise InputError(
                    f"ruler_vt can't be made: the tokenizer makes {solved} tokens of its solved example, which may "
                    f"have {_SOLVED - _SPREAD}"
                )
            least = _SOLVED + self._count(module.generate_input_output(10, 1, 4)[0]) + 30
        elif name == "ruler_cwe":
            example, text, _ = module.generate_input_output(10, tokens)
            least = self._count(example + text) + 120
        elif name == "ruler_fwe":
            least = max(200, self._count(module.TEMPLATE))
        if least and tokens < least + _SPREAD:
            raise InputError(f"--lengths {tokens} is too short for {name}: {least + _SPREAD} tokens at least")


def import_generators() -> None:
    """Imports lm-eval's generators, which would fetch NLTK's data when they are, and draw bars.

    Raises:
        InputError: packages are missing.
    """
    try:
        import nltk
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        with patch.object(nltk.data, "find"):
            needles = import_module(f"{_PACKAGE}.prepare_niah")
    except ImportError as error:
        raise InputError(f"RULER needs more packages ({one_line(error)}): pip install 'tidaldecode[eval]'") from None
    needles.sent_tokenize = PunktSentenceTokenizer().tokenize  # type: ignore[attr-defined]
    needles.tqdm = _no_bar  # type: ignore[attr-defined]


def _no_bar(documents: Iterable[Any], **_: Any) -> Iterable[Any]:
    return documents
