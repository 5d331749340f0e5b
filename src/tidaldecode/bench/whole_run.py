"""`bench generate`: the whole call of `generate`, as a user makes it, by each method beside Transformers' own."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tidaldecode.bench.hardware import GIB, check_memory
from tidaldecode.bench.roofline import kv_bytes
from tidaldecode.bench.settings import WholeRunSettings
from tidaldecode.errors import InputError, MemoryShortError
from tidaldecode.evaluate.generation_settings import Sampling
from tidaldecode.evaluate.method_options import named_plan
from tidaldecode.evaluate.study import Case, OnProgress, Study
from tidaldecode.hf import TidalCache, apply, remove
from tidaldecode.hf.second_pass import DraftLength, Lossless, check_second_pass
from tidaldecode.methods.method import METHOD_KEY, Method, check_methods
from tidaldecode.models import ChosenModel, model_shape
from tidaldecode.results.rows import Fields
from tidaldecode.results.whole_runs import WholeRunCell, whole_run_rows
from tidaldecode.texts.text import Text, TextSource

_lossless_log = logging.getLogger("tidaldecode.lossless")  # what it tells stands in the rows
_WARM_PROMPT, _WARM_TOKENS = 2048, 8  # two chunks of a prompt, and what captures the decode step
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "transformers-static": {"cache_implementation": "static"},  # on a GPU its decode steps are compiled and captured
}


@dataclass(frozen=True)
class Way:
    """A way to generate.

    Attributes:
        name: of the method, `lossless`, or one of Transformers' own.
        method: what decodes, or drafts; full attention for Transformers.
        lossless: tokens that are drafted in a round.
    """

    name: str
    method: Method
    lossless: Lossless | None = None

    @property
    def label(self) -> str:
        """In a few words."""
        if self.lossless is not None:
            return f"lossless {self.lossless}, {self.method.label}"
        return self.name if self.name in _TRANSFORMERS else self.method.label

    def key(self) -> dict[str, Any]:
        """The fields of a cell that tell it."""
        return {**self.method.key(), "method": self.name, "lossless": self.lossless}


def ways(settings: WholeRunSettings, chosen: ChosenModel, context: int) -> list[Way]:
    """Every way that the settings ask for.

    Raises:
        InputError: a plan or budget does not fit the model, or its tokens can't run a second time.
    """
    full, found = Method.named("full"), []
    plans = [named_plan(name, chosen.config) for name in settings.plans]
    tidal = [Method.named("tidal", budget, plan) for plan in plans for budget in settings.budgets or (None,)]
    for name in settings.methods_on(chosen.device.type):
        if name in ("full", *_TRANSFORMERS):
            found.append(Way(name, full))
        elif name == "tidal":
            found += [Way(name, method) for method in tidal]
        elif name == "lossless":
            check_second_pass(chosen.config, "--methods lossless")
            found += [Way(name, method, length) for method in tidal for length in settings.lossless]
        else:
            found += [Way(name, Method.named(name, budget)) for budget in settings.budgets or ()]
    check_methods([way.method for way in found], chosen.config, context)
    return found


def whole_runs(text: Text, settings: WholeRunSettings, ways: list[Way], title: str = "") -> Study:
    """Generates behind windows of a text, of each context and batch in each way.

    Each way is run once before it is measured: where what is compiled and captured does not go by what is said, with a
    short prompt and a few tokens; else whole. Its cache, and what was captured for it, stay for the run that is
    measured, as Transformers keeps its static cache.

    Raises:
        InputError: the text is shorter than a prompt.
    """
    text.spread(max(settings.contexts), 1)
    shapes = [(context, batch) for context in settings.contexts for batch in settings.batches]
    about = {"text": title, "new_tokens": settings.new_tokens}
    return Study(
        row=WholeRunCell,
        key=("context", "batch", "lossless", *METHOD_KEY),
        identity={"kind": "generate", "text": text.digest(), "new_tokens": settings.new_tokens},
        cases=[
            Case({"context": context, "batch": batch}, f"{batch} x {context:,} tokens", text.spread(context, batch))
            for context, batch in shapes
        ],
        ways=ways,
        start=lambda model: model,
        measure=partial(_measure, settings.new_tokens),
        summary=whole_run_rows,
        to_json=lambda rows: {**about, "rows": [row.model_dump() for row in rows]},
    )


def whole_runs_of(
    source: TextSource, settings: WholeRunSettings, chosen: ChosenModel, on_progress: OnProgress
) -> Study:
    """The study of a text that is not read and a model that is not loaded yet."""
    longest, new, positions = max(settings.contexts), settings.new_tokens, chosen.config.max_position_embeddings
    if longest + new > positions:
        raise InputError(
            f"--contexts {longest} and --new-tokens {new} are {longest + new} tokens, the model has {positions} "
            f"positions: give contexts of {positions - new} at most"
        )
    found = ways(settings, chosen, min(settings.contexts))
    on_progress(0, 0, "reading the text")
    text = Text.tokenize(chosen.files.tokenizer(), source.parts())
    return whole_runs(text, settings, found, source.title)


def _measure(
    new_tokens: int, model: PreTrainedModel, case: Case, way: Way, full: Fields | None, on_part: Callable[..., None]
) -> Fields:
    run = _run_of_transformers if way.name in _TRANSFORMERS else _run
    _lossless_log.disabled = True
    try:
        fields = run(model, case.what, new_tokens, way)
    except (torch.OutOfMemoryError, MemoryShortError):
        fields = {"out_of_memory": True, **dict.fromkeys(("total_ms", "prefill_ms", "decode_ms_per_token"))}
    finally:
        _lossless_log.disabled = False
    gc.collect()  # caches with captured passes may be in circles
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return fields


def _run(model: PreTrainedModel, prompts: Tensor, new_tokens: int, way: Way) -> Fields:
    batch, context = prompts.shape
    spare = 0 if way.lossless is None else DraftLength(way.lossless, new_tokens).longest
    capacity = context + new_tokens + spare
    shape = model_shape(model.config)
    needed = kv_bytes(shape.num_layers * capacity, batch, shape.num_kv_heads, shape.head_dim, model.dtype)
    check_memory(needed, model.device, f"the KV cache of {batch} x {capacity:,} tokens", "lower --batches")
    cache = TidalCache(model.config, "full", capacity)
    cache.attention = attention = way.method.attention(shape, context)
    generate = partial(_generate, model, past_key_values=cache, lossless=way.lossless)
    if way.lossless is None:
        generate(prompts[:, :_WARM_PROMPT], min(new_tokens, _WARM_TOKENS))
    else:  # how many tokens it drafts, each with a pass of its own, goes by what is said
        generate(prompts, new_tokens)
    cache.reset()
    fields = generate(prompts, new_tokens)
    share = attention.kv_read_fraction(context)
    if way.lossless is not None and cache.rounds is not None:
        rounds, share = cache.rounds, cache.for_drafts(1).attention.kv_read_fraction(context)
        passes = zip(rounds.drafted, rounds.sequences, strict=True)
        share = sum((share * drafted + 1) * sequences for drafted, sequences in passes) / max(1, sum(rounds.tokens))
        accepted = rounds.accepted_per_round
        fields["accepted_per_round"] = None if accepted is None else round(accepted, 4)
        fields["pace"] = None if rounds.pace is None else rounds.pace.to_json()
    views = cache, cache.for_drafts(1), cache.for_full_steps()
    captured = any(view.session.step is not None for view in views)
    return {**fields, "kv_read_fraction": round(share, 6), "captured": captured}


def _run_of_transformers(model: PreTrainedModel, prompts: Tensor, new_tokens: int, way: Way) -> Fields:
    options = _TRANSFORMERS[way.name]
    with _without_plan(model):
        if options:  # the captured steps are of a cache of this length
            _generate(model, prompts, new_tokens, **options)
        else:
            _generate(model, prompts[:, :_WARM_PROMPT], min(new_tokens, _WARM_TOKENS))
        return {**_generate(model, prompts, new_tokens, **options), "kv_read_fraction": 1.0}


@contextmanager
def _without_plan(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before `apply`; what Transformers keeps at it for its static cache goes away behind it."""
    remove(model)
    try:
        yield
    finally:
        for name in ("_cache", "_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
            vars(model).pop(name, None)
        apply(model, "full")


def _generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int, **options: Any) -> dict[str, Any]:
    """So many greedy tokens behind the prompts: the times of a cell, and the most memory that was allocated."""
    device, batch = model.device, len(prompts)
    prompts = prompts.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    watch, began = _Stopwatch(), time.perf_counter()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        streamer=watch,
        **{**Sampling().options(), "eos_token_id": None, "pad_token_id": 0, **options},
    )
    assert watch.first is not None and watch.last is not None
    decode_s = watch.last - watch.first
    return {
        "total_ms": round((watch.last - began) * 1000, 3),
        "prefill_ms": round((watch.first - began) * 1000, 3),
        "decode_ms_per_token": round(decode_s / (new_tokens - 1) * 1000, 4),
        "tokens_per_second": round(batch * (new_tokens - 1) / decode_s, 2),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 3) if device.type == "cuda" else None,
    }


class _Stopwatch(BaseStreamer):
    """When the first new tokens came, and the last."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Tokens of all sequences, on the host: the device was waited for."""
        now = time.perf_counter()
        if self._prompt:
            self._prompt = False
        elif self.first is None:
            self.first = now

    def end(self) -> None:
        """All is there."""
        self.last = time.perf_counter()
