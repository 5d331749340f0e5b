"""Needle in a haystack: whether each method says the number that is hidden in a long text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from tidaldecode.evaluate.method_options import MethodOptions
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.evaluate.study import Case, OnProgress, Study
from tidaldecode.methods.method import METHOD_KEY, Method, with_full
from tidaldecode.models import ChosenModel
from tidaldecode.results.needles import NeedleRow, NeedleSummary, needle_summary
from tidaldecode.results.rows import Fields
from tidaldecode.texts.haystack import NeedleCase, NeedleSettings, needle_cases
from tidaldecode.texts.text import Text, TextSource


def needles(
    haystack: Text, prompts: Sequence[NeedleCase], settings: NeedleSettings, methods: Sequence[Method], title: str = ""
) -> Study:
    """Whether full attention and each method say a needle's number when asked for it, decoding greedily.

    The prompt but for its last token is read with full attention, once for all methods. The last token and the answer
    are decoded under the method. Nothing is generated: greedy decoding says the answer if and only if, at each of its
    tokens, the most probable next token after the prompt and the answer so far is the answer's next. One pass over the
    answer decides that (`tidaldecode.evaluate.scoring`), and gives what `generate` would. What comes behind the seven
    digits does not count. The same digits split into other tokens than the tokenizer's count as a miss.

    Args:
        haystack: the text that the prompts were made with.
        prompts: see `needle_cases`.
        methods: checked, see `check_methods`; `full` is added where it is missing. A budget that is a fraction is one
            of the prompt.
        title: the haystack's name.
    """
    longest = max(prompt.length + len(prompt.answer) for prompt in prompts)
    return Study(
        row=NeedleRow,
        key=("length", "depth", "repeat", *METHOD_KEY),
        identity={"kind": "needle", "text": haystack.digest(), "seed": settings.seed},
        cases=[
            Case(
                {"length": prompt.length, "depth": prompt.depth, "repeat": prompt.repeat},
                f"{prompt.length:,} tokens, depth {prompt.depth:.2f}",
                prompt,
            )
            for prompt in prompts
        ],
        ways=with_full(methods),
        start=lambda model: HeldPrompt(model, longest),
        read=lambda held, case: held.read(case.what.prompt(haystack), decode=0),
        measure=_measure,
        summary=needle_summary,
        to_json=lambda rows: {"haystack": title, **asdict(settings), **_to_json(rows)},
    )


def needles_of(
    source: TextSource, settings: NeedleSettings, methods: MethodOptions, chosen: ChosenModel, on_progress: OnProgress
) -> Study:
    """The study of a haystack that is not read and a model that is not loaded yet."""
    given = methods.checked(chosen.config, min(settings.lengths))
    on_progress(0, 0, "reading the haystack")
    tokenizer = chosen.files.tokenizer()
    text = Text.tokenize(tokenizer, source.parts())
    prompts = needle_cases(tokenizer, text, settings, chosen.config)
    return needles(text, prompts, settings, given, source.title)


def _measure(held: HeldPrompt, case: Case, method: Method, full: Fields | None, on_part: Callable[..., None]) -> Fields:
    held.attend_by(method, case.what.length)
    answer = torch.tensor([case.what.answer])
    return {
        "correct": int(held.scores(torch.cat([held.rest, answer], 1)).greedy.all()),
        "total": 1,
        "kv_read_fraction": round(held.cache.attention.kv_read_fraction(case.what.length), 6),
    }


def _to_json(rows: Sequence[NeedleSummary]) -> dict[str, Any]:
    """`accuracy` of a single method (else `null`), `full_accuracy`, `rows`, and `cells` of them all."""
    own = [row for row in rows if row.method != "full"] or rows
    methods = [row.model_dump(exclude={"cells"}) for row in rows]
    found = [{name: getattr(row, name) for name in ("correct", "total", "accuracy")} for row in rows]
    return {
        "accuracy": own[0].accuracy if len(own) == 1 else None,
        "full_accuracy": next(row.accuracy for row in rows if row.method == "full"),
        "rows": [{**method, **counts} for method, counts in zip(methods, found, strict=True)],
        "cells": [
            {**method, **cell._asdict()} for method, row in zip(methods, rows, strict=True) for cell in row.cells
        ],
    }
