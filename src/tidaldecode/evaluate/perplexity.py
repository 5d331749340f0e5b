"""Perplexity of the last tokens of windows of a text, by each method, beside full attention on the same prefills."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from tidaldecode.errors import InputError
from tidaldecode.evaluate.method_options import MethodOptions
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.evaluate.study import Case, OnProgress, Study
from tidaldecode.methods.method import METHOD_KEY, Method, with_full
from tidaldecode.models import ChosenModel
from tidaldecode.results.perplexity import PplCell, PplSummary, ppl_summary
from tidaldecode.results.rows import Fields
from tidaldecode.texts.text import Text, TextSource
from tidaldecode.texts.windows import Windows

BIN_TOKENS = 32
"""Positions that a cell's `nll_by_position` averages over."""


def perplexity(text: Text, windows: Windows, methods: Sequence[Method], title: str = "") -> Study:
    """Negative log-likelihood of the last tokens of windows of a text, by full attention and by each method.

    Of a window `w[0 .. context)`, the tokens `w[0 .. context - decode - 1)` are read with full attention, once for all
    methods. Then `w[context - decode - 1 .. context - 1)` are decoded, each under the method, with the given tokens as
    input (teacher-forced): their logits predict `w[context - decode .. context)`, and these `decode` tokens are scored.
    So the last token of the prompt is decoded under the method too, and every scored token's logits are the method's.
    `nll` is the mean of `-ln p(token)` over them, in nats; each window counts the same. All decode steps of a window go
    in one pass or a few (`tidaldecode.evaluate.scoring`).

    Args:
        methods: checked, see `check_methods`; `full` is added where it is missing.
        title: the text's name.

    Raises:
        InputError: the text is too short.
    """
    windows.check_text(text)
    return Study(
        row=PplCell,
        key=("window", *METHOD_KEY),
        identity={"kind": "ppl", "text": text.digest(), "context": windows.context, "decode": windows.decode},
        cases=window_cases(windows),
        ways=with_full(methods),
        start=lambda model: HeldPrompt(model, windows.context),
        read=lambda held, case: held.read(text.window(case.what, windows.context), windows.decode),
        measure=partial(_measure, windows),
        summary=ppl_summary,
        to_json=lambda rows: {"text": title, **asdict(windows), **_to_json(rows)},
    )


def perplexity_of(
    source: TextSource, windows: Windows, methods: MethodOptions, chosen: ChosenModel, on_progress: OnProgress
) -> Study:
    """The study of a text that is not read and a model that is not loaded yet."""
    windows.check(chosen.config)
    given = methods.checked(chosen.config, windows.context)
    on_progress(0, 0, "reading the text")
    return perplexity(Text.tokenize(chosen.files.tokenizer(), source.parts()), windows, given, source.title)


def window_cases(windows: Windows) -> tuple[Case, ...]:
    """A case for each window, which goes by its first token's place in the text."""
    return tuple(
        Case({"window": start}, f"window {number} of {windows.windows}", start)
        for number, start in enumerate(windows.starts, start=1)
    )


def _measure(
    windows: Windows, held: HeldPrompt, case: Case, method: Method, full: Fields | None, on_part: Callable[..., None]
) -> Fields:
    began = time.perf_counter()
    held.attend_by(method, windows.context)
    try:
        nll = -held.scores(held.rest).log_probs.double().cpu()
    except InputError as error:
        raise InputError(f"{method.label} at token {case.what}: {error}") from None
    mean = float(nll.mean())
    return {
        "nll": mean,
        "full_nll": mean if full is None else full["nll"],
        "tokens": len(nll),
        "first_position": windows.context - windows.decode,
        "bin_tokens": BIN_TOKENS,
        "kv_read_fraction": round(held.cache.attention.kv_read_fraction(windows.context), 6),
        "nll_by_position": [float(part.mean()) for part in torch.split(nll, BIN_TOKENS)],
        "seconds": round(time.perf_counter() - began, 3),
    }


def _to_json(rows: Sequence[PplSummary]) -> dict[str, Any]:
    """All rows; `nll`, `full_nll` and `gap` of a single method are on top."""
    others = [row for row in rows if row.method != "full"] or rows
    single = others[0].model_dump(include={"nll", "full_nll", "gap"}) if len(others) == 1 else {}
    return {**single, "rows": [row.model_dump() for row in rows]}
