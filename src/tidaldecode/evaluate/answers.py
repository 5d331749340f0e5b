"""Free-running answers to questions about long documents by each method, beside full attention's own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.evaluate.answer_settings import AnswerSettings
from tidaldecode.evaluate.free_running import full_log_prob, seed_of, write_answer
from tidaldecode.evaluate.generation import share_read
from tidaldecode.evaluate.generation_settings import Passes
from tidaldecode.evaluate.method_options import MethodOptions
from tidaldecode.evaluate.overlap import loops, repetition, rouge_l, token_f1
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.evaluate.study import Case, OnProgress, Study
from tidaldecode.methods.method import METHOD_KEY, Method, with_full
from tidaldecode.models import ChosenModel
from tidaldecode.results.answers import OTHER_SEED, AnswerCell, AnswerSummary, answer_summary, nll_over_floor
from tidaldecode.results.rows import Fields
from tidaldecode.texts.questions import Asked, Question, ask


@dataclass(frozen=True)
class Writer:
    """Who answers.

    Attributes:
        draw: 1 of full attention's second answer, which differs from the first by its random numbers alone.
    """

    method: Method
    draw: int = 0

    @property
    def label(self) -> str:
        """In a few words."""
        return OTHER_SEED if self.draw else self.method.label

    def key(self) -> dict[str, Any]:
        """The fields of a cell that tell it."""
        return {"draw": self.draw, **self.method.key()}


def answers(
    tokenizer: Tokenizer, asked: Sequence[Asked], settings: AnswerSettings, methods: Sequence[Method], title: str = ""
) -> Study:
    """Answers by full attention and by each method, and what full attention makes of them.

    A prompt but for its last token is read with full attention, once for all methods; the last token and the answer are
    decoded under the method, token by token. Then one teacher-forced pass behind the same prompt gives the
    probabilities that full attention has for the answer's tokens, at temperature 1. `surprise` is the mean log
    probability of full attention's own answer less that of the method's, in nats per token. Where answers are sampled,
    full attention answers once more with other random numbers: the floor of all measures.

    Args:
        asked: see `tidaldecode.texts.questions.ask`.
        methods: checked, see `check_methods`; `full` is added where it is missing. A budget that is a fraction is one
            of the prompt.
        title: the questions' name.
    """
    full, *others = map(Writer, with_full(methods))
    floor = [Writer(full.method, draw=1)] if settings.sampling.temperature > 0 else []
    own = {"context": settings.context, "max_new_tokens": settings.max_new_tokens, **asdict(settings.sampling)}
    own["plain_prompt"] = settings.plain_prompt
    return Study(
        row=AnswerCell,
        key=("question", "draw", *METHOD_KEY),
        identity={"kind": "answers", **own},
        cases=[_case(one) for one in asked],
        ways=[full, *floor, *others],
        start=lambda model: HeldPrompt(model, settings.longest),
        read=lambda held, case: held.read(torch.tensor([case.what.token_ids]), decode=0),
        measure=partial(_measure, tokenizer, settings),
        summary=answer_summary,
        to_json=lambda rows: {"questions": title, **own, **_to_json(rows)},
    )


def answers_of(
    questions: Sequence[Question],
    title: str,
    settings: AnswerSettings,
    methods: MethodOptions,
    chosen: ChosenModel,
    on_progress: OnProgress,
) -> Study:
    """The study of questions that are not cut to a context and a model that is not loaded yet."""
    settings.check(chosen.config.max_position_embeddings)
    on_progress(0, 0, "reading the documents")
    tokenizer = chosen.files.tokenizer()
    asked = list(ask(tokenizer, questions, settings.context, settings.plain_prompt))
    given = methods.checked(chosen.config, min(len(one.token_ids) for one in asked))
    return answers(tokenizer, asked, settings, given, title)


def _case(asked: Asked) -> Case:
    question = asked.question
    made_of = {
        "asked": question.question,
        "references": list(question.references),
        "task": question.task,
        "prompt_digest": hashlib.sha256(repr(asked.token_ids).encode()).hexdigest()[:16],
    }
    return Case({"question": question.name}, f"question {question.name}", asked, made_of=made_of)


def _measure(
    tokenizer: Tokenizer,
    settings: AnswerSettings,
    held: HeldPrompt,
    case: Case,
    writer: Writer,
    full: Fields | None,
    on_part: Callable[[float], None],
) -> Fields:
    began, asked = time.perf_counter(), case.what
    seed = seed_of(settings.sampling.seed, asked.question.name, writer.draw)
    ids = write_answer(held, writer.method, settings.max_new_tokens, settings.sampling, seed)
    # the first step takes the prompt's last token
    share = round(share_read(held.cache, Passes(), held.window.shape[1] - 1, len(ids)), 6)
    nll = -full_log_prob(held, ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    own = text if full is None else full["text"]
    right = asked.question.references
    return {
        "prompt_tokens": len(asked.token_ids),
        "cut": asked.cut,
        "text": text,
        "token_ids": ids,
        "tokens": len(ids),
        "ended": len(ids) < settings.max_new_tokens or ids[-1] in _ends(held),
        "nll": nll,
        "full_nll": nll if full is None else full["nll"],
        "repetition": repetition(ids),
        "loops": loops(ids),
        "rouge_l": rouge_l(text, own),
        "f1": token_f1(text, own),
        "reference_rouge_l": max((rouge_l(text, reference) for reference in right), default=None),
        "reference_f1": max((token_f1(text, reference) for reference in right), default=None),
        "kv_read_fraction": share,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _ends(held: HeldPrompt) -> list[int]:
    """The model's tokens that end a sequence."""
    end = held.model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _to_json(rows: Sequence[AnswerSummary]) -> dict[str, Any]:
    """`surprise` of a single method, else `null`; `rows`, and `cells`, which are all answers."""
    others = [row for row in rows if row.method["method"] != "full"]
    single = others[0].means["surprise"] if len(others) == 1 else None
    return {
        "surprise": single and single.value,
        "rows": [{**row.to_json(), "nll_over_other_seed": nll_over_floor(row, rows)} for row in rows],
        "cells": [cell for row in rows for cell in row.cells],
    }
