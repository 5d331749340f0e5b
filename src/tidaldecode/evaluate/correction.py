"""The study of cache correction and lossless decoding: quality and time over the tokens between two full passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tidaldecode.evaluate.generation import first_difference, share_read
from tidaldecode.evaluate.generation_settings import Passes, Sampling
from tidaldecode.evaluate.perplexity import window_cases
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.evaluate.study import Case, OnProgress, Study
from tidaldecode.hf.second_pass import check_second_pass
from tidaldecode.methods.method import METHOD_KEY, Method, check_methods
from tidaldecode.methods.tidal import Tidal
from tidaldecode.models import ChosenModel
from tidaldecode.plan import TidalPlan
from tidaldecode.plans.find import find_plan
from tidaldecode.results.correction import CorrectionCell, Mode, rows_of
from tidaldecode.results.rows import Fields
from tidaldecode.texts.text import Text, TextSource
from tidaldecode.texts.windows import Windows


@dataclass(frozen=True)
class Decoding:
    """One way to decode.

    Attributes:
        mode: full attention; the plan alone; with correction; lossless.
        length: tokens between two passes with full attention; `None` for `full` and `plain`.
        method: what decodes, or drafts.
    """

    mode: Mode
    length: int | None
    method: Method

    @property
    def label(self) -> str:
        """In a few words."""
        return f"{self.mode} {self.length or ''}"

    def key(self) -> dict[str, Any]:
        """The fields of a cell that tell it."""
        return {"mode": self.mode, "length": self.length, **self.method.key()}

    @property
    def options(self) -> dict[str, int]:
        """What tells `generate` how often full attention looks over the plan's shoulder."""
        if self.length is None:
            return {}
        return {"lossless" if self.mode == "lossless" else "correction_interval": self.length}


def decodings(plan: TidalPlan, budgets: Sequence[int | float], lengths: Sequence[int]) -> Iterator[Decoding]:
    """Full attention, then for each budget the plan alone, and correction and lossless decoding at each length."""
    yield Decoding("full", None, Method.named("full"))
    for budget in budgets:
        method = Method.named("tidal", budget, plan)
        yield Decoding("plain", None, method)
        yield from (Decoding("correction", length, method) for length in lengths)
        yield from (Decoding("lossless", length, method) for length in lengths)


def correction(text: Text, windows: Windows, ways: Sequence[Decoding], title: str = "") -> Study:
    """Decodes the ends of windows of a text in every way: the given tokens for the gap, its own for the time.

    Args:
        windows: of each the last `decode` tokens are scored, and as many are generated greedily.
        ways: full attention first, see `decodings`.
        title: the text's name.

    Raises:
        InputError: the text is too short.
    """
    windows.check_text(text)
    capacity = windows.context + max(way.length or 0 for way in ways)
    method = ways[-1].method
    about = {"text": title, "plan": method.plan.name if isinstance(method, Tidal) else None, **asdict(windows)}
    return Study(
        row=CorrectionCell,
        key=("window", "mode", "length", *METHOD_KEY),
        identity={"kind": "correction", "text": text.digest(), "context": windows.context, "decode": windows.decode},
        cases=window_cases(windows),
        ways=ways,
        start=lambda model: HeldPrompt(model, capacity),
        read=lambda held, case: held.read(text.window(case.what, windows.context), windows.decode),
        measure=_measure,
        summary=rows_of,
        to_json=lambda rows: {**about, "rows": [row.model_dump() for row in rows]},
    )


def correction_of(
    source: TextSource,
    windows: Windows,
    plan: str,
    budgets: Sequence[int | float],
    lengths: Sequence[int],
    chosen: ChosenModel,
    on_progress: OnProgress,
) -> Study:
    """The study of a text that is not read and a model that is not loaded yet."""
    windows.check(chosen.config)
    check_second_pass(chosen.config, f"--model {chosen.files.name}")
    ways = list(decodings(find_plan(plan, chosen.config), budgets, lengths))
    check_methods([way.method for way in ways], chosen.config, windows.context)
    on_progress(0, 0, "reading the text")
    return correction(Text.tokenize(chosen.files.tokenizer(), source.parts()), windows, ways, source.title)


def _measure(held: HeldPrompt, case: Case, way: Decoding, full: Fields | None, on_part: Callable[..., None]) -> Fields:
    cache, on_gpu, new = held.cache, held.model.device.type == "cuda", held.rest.shape[1] - 1
    held.attend_by(way.method, cache.capacity)
    lossless = full if way.mode == "lossless" else None
    if lossless is None:
        interval = way.length if way.mode == "correction" else None
        scores = held.scores(held.rest, correction_interval=interval, own_steps=on_gpu)
        nll = -float(scores.log_probs.double().mean())
    if on_gpu:  # what the rounds need is compiled and captured before the clock runs
        _generate(held, way, min(new, tokens_of_warm_up(way.length)))
    tokens, ms = _generate(held, way, new)
    share = share_read(cache, Passes(**way.options), held.window.shape[1] - new - 1, new)
    measured = {"ms_per_token": ms, "token_ids": tokens, "kv_read_fraction": round(share, 6)}
    if lossless is None:
        return {"nll": nll, **measured}
    assert cache.rounds is not None
    return {
        "nll": lossless["nll"],
        **measured,
        "accepted_per_round": cache.rounds.accepted_per_round or 1.0,  # of rounds that had nothing left to draft
        "first_difference": first_difference(tokens, lossless["token_ids"]),
    }


def _generate(held: HeldPrompt, way: Decoding, tokens: int) -> tuple[list[int], float]:
    """So many greedy tokens behind the prompt, and their milliseconds per token."""
    cache, length = held.cache, held.cache.get_seq_length()
    prompt = held.window[:, : length + 1].to(held.model.device)
    options = {**Sampling().options(), "eos_token_id": None, "pad_token_id": 0, **way.options}
    began = time.perf_counter()
    output = held.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=tokens, **options
    )
    new = output[0, length + 1 :].tolist()  # waits for the device
    ms = (time.perf_counter() - began) * 1000 / tokens
    cache.crop(length - cache.get_seq_length())
    return new, ms


def tokens_of_warm_up(length: int | None) -> int:
    """New tokens in which a round drafts all `length` tokens that it may, also if a first one drafts none."""
    return (length or 0) + 3
