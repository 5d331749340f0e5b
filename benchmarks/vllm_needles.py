"""Needles of the demo model as token ids, for machines without the texts."""

from __future__ import annotations

from typing import Any

from tidaldecode.models import find_model
from tidaldecode.texts.haystack import NeedleSettings, needle_cases
from tidaldecode.texts.text import Text, paul_graham_essays


def needles(cases: int, length: int) -> list[dict[str, Any]]:
    """Prompts of `length` tokens of Paul Graham's essays, each with its answer: `prompt` and `answer`, as token ids."""
    files = find_model("smollm2-135m")
    tokenizer = files.tokenizer()
    haystack = Text.tokenize(tokenizer, [paul_graham_essays()])
    settings = NeedleSettings((length,), depths=10, repeats=-(-cases // 10))
    found = needle_cases(tokenizer, haystack, settings, files.config())[:cases]
    return [{"prompt": case.prompt(haystack)[0].tolist(), "answer": list(case.answer)} for case in found]


def found(cases: list[dict[str, Any]], answers: list[list[int]]) -> int:
    """How many answers begin with the needle."""
    pairs = zip(cases, answers, strict=True)
    return sum(answer[: len(case["answer"])] == case["answer"] for case, answer in pairs)
