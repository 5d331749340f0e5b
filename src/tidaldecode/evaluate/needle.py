"""Needle in a haystack (the TidalDecode paper's task): one sentence in a long text, asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError
from tidaldecode.evaluate.scoring import score_tokens
from tidaldecode.hf import TidalCache
from tidaldecode.methods.method import METHOD_KEY, Method, check_plan_names, with_full
from tidaldecode.models import model_shape
from tidaldecode.plans.find import find_plan
from tidaldecode.results.cells import Cells
from tidaldecode.results.needles import NeedleSummary, needle_summary
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import read_prompt

CELL_KEY = ("length", "depth", "repeat", *METHOD_KEY)
"""Fields that tell one cell from another."""

_CITIES = (
    "Amsterdam Athens Berlin Bogota Cairo Dublin Geneva Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon "
    "Madrid Manila Nairobi Oslo Prague Quito Rome Seoul Sydney Tokyo Vienna Warsaw Zurich"
).split()


@dataclass(frozen=True)
class NeedleSettings:
    """Which needles are hidden.

    Attributes:
        lengths: tokens of the prompts.
        depths: how many depths, evenly spaced from start to end.
        repeats: needles for each length and depth.
        seed: of the cities, the numbers and the stretches of the haystack.
    """

    lengths: tuple[int, ...] = (4000,)
    depths: int = 10
    repeats: int = 1
    seed: int = 0


@dataclass(frozen=True)
class NeedleCase:
    """A prompt that ends where the number of its needle is to follow.

    Attributes:
        length: tokens of the prompt.
        depth: where the needle lies, 0 (start) to 1 (end).
        repeat: number of the case among those of its length and depth.
        start: the first token of the haystack that is used.
        needle, question, answer: token ids; the answer is how its digits continue the question's tokens.
    """

    length: int
    depth: float
    repeat: int
    start: int
    needle: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    def prompt(self, haystack: Text) -> Tensor:
        """Haystack, needle, haystack, question: [1, length], int64."""
        rest = self.length - len(self.needle) - len(self.question)
        hay = haystack.window(self.start, rest)[0]
        before = max(len(haystack.prefix), round(self.depth * rest))
        ids = [hay[:before], torch.tensor(self.needle), hay[before:], torch.tensor(self.question)]
        return torch.cat(ids)[None]


@dataclass(frozen=True)
class NeedleReport:
    """Needles found by each method, and what they were hidden in.

    Attributes:
        environment: command, versions, device.
        haystack: name of the text.
        seconds: of this run, without loading; of a run that was taken up again only the rest.
        rows: full attention, then each method at each budget.
        figure: the heatmaps, a PNG file, if one was written.
    """

    environment: dict[str, object]
    model: str
    dtype: str
    haystack: str
    settings: NeedleSettings
    seconds: float
    rows: tuple[NeedleSummary, ...]
    figure: str | None

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object: `accuracy` of a single method (else `null`), `rows`, and `cells` of them all.

        Full attention is among the rows and the cells, and its accuracy is `full_accuracy` too.
        """
        methods = [{**row.variant._asdict(), "budget": row.budget} for row in self.rows]
        own = [row for row in self.rows if row.variant.method != "full"] or self.rows
        full = next(row for row in self.rows if row.variant.method == "full")
        return {
            **self.environment,
            "model": self.model,
            "dtype": self.dtype,
            "haystack": self.haystack,
            **asdict(self.settings),
            "seconds": self.seconds,
            "accuracy": own[0].accuracy if len(own) == 1 else None,
            "full_accuracy": full.accuracy,
            "rows": [
                {**method, "correct": row.correct, "total": row.total, "accuracy": row.accuracy}
                for method, row in zip(methods, self.rows, strict=True)
            ],
            "cells": [
                {**method, **cell._asdict()}
                for method, row in zip(methods, self.rows, strict=True)
                for cell in row.cells
            ],
            "figure": self.figure,
        }


def needle_cases(
    tokenizer: Tokenizer, haystack: Text, settings: NeedleSettings, config: PreTrainedConfig
) -> tuple[NeedleCase, ...]:
    """Cases of every length, depth and repeat, each with its own city, number and stretch of the haystack.

    A case depends on the seed and on its length, depth and repeat alone: more repeats keep the cases that were there.

    Args:
        tokenizer: the one that the haystack was tokenized with.
        haystack: the text that hides the needles.
        config: the model's.

    Raises:
        InputError: a length is beyond the model's positions or leaves no haystack, or the haystack has too few tokens.
    """
    cases = tuple(
        _case(tokenizer, haystack, length, round(index / max(1, settings.depths - 1), 4), repeat, settings.seed)
        for length in settings.lengths
        for index in range(settings.depths)
        for repeat in range(settings.repeats)
    )
    for case in cases:
        _check_positions(case, config)
    return cases


def _case(tokenizer: Tokenizer, haystack: Text, length: int, depth: float, repeat: int, seed: int) -> NeedleCase:
    generator = random.Random(f"{seed} {length} {depth} {repeat}")
    city, digits = generator.choice(_CITIES), str(generator.randint(1_000_000, 9_999_999))
    needle = _tokens(tokenizer, f" The special magic {city} number is: {digits}.")
    asked = f"\n\nThe special magic {city} number is:"
    question = _tokens(tokenizer, asked)
    asked_and_answered = _tokens(tokenizer, f"{asked} {digits}")
    joined = asked_and_answered[: len(question)] == question  # else the tokenizer merges the answer with the colon
    answer = asked_and_answered[len(question) :] if joined else _tokens(tokenizer, f" {digits}")
    hay = length - len(haystack.prefix) - len(needle) - len(question)
    if hay < 1:
        raise InputError(
            f"prompts of {length} tokens have no room for a haystack: needle and question are {length - hay} tokens"
        )
    there = len(haystack.tokens)
    if there < hay:
        raise InputError(f"the haystack has {there} tokens, {hay - there} too few for prompts of {length}")
    return NeedleCase(length, depth, repeat, generator.randrange(there - hay + 1), needle, question, answer)


def _tokens(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_positions(case: NeedleCase, config: PreTrainedConfig) -> None:
    positions, needed = config.max_position_embeddings, case.length + len(case.answer)
    if needed > positions:
        raise InputError(
            f"prompts of {case.length} tokens and answers of {len(case.answer)} are beyond the model's {positions} "
            f"positions: lengths of {positions - len(case.answer)} at most"
        )


def cell_identity(settings: NeedleSettings, model: Mapping[str, Any], haystack: Text) -> dict[str, Any]:
    """What all cells of a file of results have in common.

    Args:
        model: see `tidaldecode.models.ModelFiles.identity`.
    """
    return {
        "kind": "needle",
        **model,
        "text": haystack.digest(),
        "seed": settings.seed,
    }


def finished(cases: Sequence[NeedleCase], methods: Sequence[Method], cells: Cells) -> list[NeedleSummary] | None:
    """What `find_needles` returns, if nothing is left to be measured: then no model is needed.

    Raises:
        InputError: one plan's name stands for another in `cells`.
    """
    methods = with_full(methods)
    check_plan_names([*cells.rows, *(method.key() for method in methods)])
    # the cells of these cases and methods alone: the file may hold others
    rows = [cells.find(**_key(case, method)) for method in methods for case in cases]
    found = [row for row in rows if row is not None]
    return needle_summary(found) if len(found) == len(rows) else None


def find_needles(
    model: PreTrainedModel,
    haystack: Text,
    cases: Sequence[NeedleCase],
    methods: Sequence[Method],
    cells: Cells,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[NeedleSummary]:
    """Whether full attention and each method say a needle's number when asked for it, decoding greedily.

    The prompt but for its last token is read with full attention, once for all methods. The last token and the answer
    are decoded under the method. Nothing is generated: greedy decoding says the answer if and only if, at each of its
    tokens, the most probable next token after the prompt and the answer so far is the answer's next. One pass over the
    answer decides that (`tidaldecode.evaluate.scoring`), and gives what `generate` would. What comes behind the seven
    digits does not count. The same digits split into other tokens than the tokenizer's count as a miss.

    Args:
        model: with a plan applied.
        haystack: the text that the cases were made with.
        cases: see `needle_cases`.
        methods: checked, see `check_methods`; `full` is added where it is missing. A budget that is a fraction is one
            of the prompt.
        cells: what was measured before, which is not measured again; each new cell is appended when it is done.
        on_progress: told how many prefills and cells of how many are done, and in words what comes next.

    Returns:
        A summary of full attention, then of each method in the order given.

    Raises:
        InputError: one plan's name stands for another in `cells`, or a likelihood is not finite.
    """
    methods = with_full(methods)
    check_plan_names([*cells.rows, *(method.key() for method in methods)])
    total, done = len(cases) * (1 + len(methods)), 0
    capacity = max(case.length + len(case.answer) for case in cases)
    cache = TidalCache(model.config, find_plan("full", model.config), capacity)
    for case in cases:
        missing = [method for method in methods if cells.find(**_key(case, method)) is None]
        where = f"{case.length:,} tokens, depth {case.depth:.2f}"
        if missing:
            on_progress(done, total, f"{where}: reading")
            last = read_prompt(model, cache, case.prompt(haystack), decode=0)  # [1, 1]
        done += 1 + len(methods) - len(missing)
        for method in missing:
            on_progress(done, total, f"{where}: {method.label}")
            found = _says_answer(model, cache, last, case, method)
            cells.append({**_key(case, method), "correct": int(found), "total": 1})
            done += 1
    on_progress(done, total, "done")
    summary = finished(cases, methods, cells)
    assert summary is not None
    return summary


def _key(case: NeedleCase, method: Method) -> dict[str, Any]:
    return {"length": case.length, "depth": case.depth, "repeat": case.repeat, **method.key()}


def _says_answer(model: PreTrainedModel, cache: TidalCache, last: Tensor, case: NeedleCase, method: Method) -> bool:
    """Decodes the prompt's last token and the answer under a method, and takes them out of the cache again."""
    prompt = cache.get_seq_length()
    cache.attention = method.attention(model_shape(model.config), case.length)
    with torch.inference_mode():
        greedy = score_tokens(model, cache, torch.cat([last, torch.tensor([case.answer])], 1)).greedy
    cache.crop(prompt - cache.get_seq_length())
    return bool(greedy.all())
