"""`bench decode`: whole decode steps of a model, from the embedding to the next token, by each method in one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tidaldecode.bench.filling import Filling, RandomKV, TextKV
from tidaldecode.bench.hardware import GIB, check_memory, measuring
from tidaldecode.bench.methods import step_attention
from tidaldecode.bench.roofline import floor_us, kv_bytes, weight_bytes
from tidaldecode.bench.settings import REPEATS, WARM_UP, DecodeSettings
from tidaldecode.bench.shapes import RandomModel
from tidaldecode.bench.timing import Timing, time_steps
from tidaldecode.bench.timing_report import TimingReport
from tidaldecode.errors import InputError
from tidaldecode.hf import TidalCache, apply
from tidaldecode.models import ModelFiles, check_architecture, check_dtype, check_plan, model_shape
from tidaldecode.plan import TidalPlan
from tidaldecode.plans.find import find_plan
from tidaldecode.results.timings import DecodeRow
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import check_context

_MOST_WINDOWS = 8  # of a text, that are read
_WORKSPACE = GIB  # activations, index sets, kernels' scratch memory
_MEND = "lower --contexts or --batch"


def bench_decode(
    source: ModelFiles | RandomModel,
    settings: DecodeSettings,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[str], None] = lambda what: None,
    on_report: Callable[[TimingReport[DecodeRow]], None] = lambda report: None,
    text: Text | None = None,
) -> TimingReport[DecodeRow]:
    """Times decode steps of one model by every method, all through the same cache and the same engine.

    The cache holds K and V of a text, or random ones: the time of full attention does not depend on what they are, that
    of choosing tokens does.

    Args:
        source: the model.
        settings: contexts, methods and budgets.
        device: the GPU, or the CPU for small shapes.
        dtype: of the model and its cache.
        on_progress: told, in words, what is being done.
        on_report: called with the report so far whenever a context is done.
        text: whose windows' K and V are decoded behind, several in a batch; `None` for random ones.

    Raises:
        InputError: a setting does not fit the model, the GPU has no such dtype, or memory is short.
    """
    check_dtype(device, dtype)
    config = source.config()
    plan = _checked_plan(config, settings)
    windows = None if text is None else _windows(text, config, settings)
    with measuring(device, _MEND):
        check_memory(
            _memory(config, settings, dtype, windows is not None),
            device,
            f"{source.name}, batch {settings.batch}",
            _MEND,
        )
        on_progress("read bandwidth")
        report = TimingReport[DecodeRow].on(device, dtype)
        on_progress(f"making {source.name}")
        torch.manual_seed(settings.seed)
        model = apply(source.model(device, dtype), plan)
        report = report.with_about(
            model=source.name,
            plan=plan.name,
            batch=settings.batch,
            weight_gb=round(weight_bytes(model, settings.batch) / 1e9, 4),  # that a step reads
            sets_per_kv_head=round(plan.sets_per_kv_head(model_shape(config)), 4),
        )
        cache = TidalCache(model.config, plan, settings.capacity)
        filling: Filling = RandomKV(model, settings.batch, settings.seed)
        if windows is not None:
            filling = TextKV(model, windows, settings.batch, settings.capacity - max(settings.contexts), on_progress)
        engine = _Engine(model, cache, plan, settings, filling, report.about["read_bandwidth_gbs"])
        for context in settings.contexts:
            rows = []
            for method, budget in settings.runs():
                on_progress(f"{source.name}: {method}{f' {budget}' if budget else ''}, {context:,} tokens")
                rows.append(engine.measure(method, budget, context))
            report = report.with_rows(_with_speedups(rows))
            on_report(report)
    return report


def _checked_plan(config: PreTrainedConfig, settings: DecodeSettings) -> TidalPlan:
    check_architecture(config)
    plan = find_plan(settings.plan, config)
    check_plan(plan, config)
    for budget in settings.budgets:
        plan.with_budget(budget)
    if None in plan.roles:
        raise InputError(f"{config.model_type!r} has layers with a sliding window: only models without are measured")
    return plan


def _windows(text: Text, config: PreTrainedConfig, settings: DecodeSettings) -> Tensor:
    """Windows of the text, one for each sequence as far as they go, see `TextKV`."""
    longest = max(settings.contexts)
    check_context(longest, config.max_position_embeddings)
    return text.spread(longest + 1, min(settings.batch, _MOST_WINDOWS))


def _memory(config: PreTrainedConfig, settings: DecodeSettings, dtype: torch.dtype, of_text: bool = False) -> float:
    """Bytes that the weights, the cache and the work on them need; a text is read in one more cache of a sequence."""
    shape = model_shape(config)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    tokens = shape.num_layers * settings.capacity
    cache = kv_bytes(tokens, settings.batch, shape.num_kv_heads, shape.head_dim, dtype)
    cache += of_text * cache / settings.batch
    page_bounds = cache / 8 if "quest" in settings.methods else 0
    scores = 4 * 4 * settings.batch * shape.num_query_heads * settings.capacity
    return weights * dtype.itemsize + cache + page_bounds + scores + _WORKSPACE


@dataclass(frozen=True)
class _Engine:
    """The model and the one cache that all methods decode with."""

    model: PreTrainedModel
    cache: TidalCache
    plan: TidalPlan
    settings: DecodeSettings
    filling: Filling
    bandwidth_gbs: float

    def measure(self, method: str, budget: int | float | None, context: int) -> DecodeRow:
        """The row of one method at one context, its speed-up left open."""
        shape, batch = model_shape(self.model.config), self.settings.batch
        attention = step_attention(method, self.plan, shape, budget, context)
        self.cache.attention = attention
        timing = self._time(context)
        tokens = sum(min(tokens, context) for tokens in attention.tokens_read(context).values())
        read = kv_bytes(tokens, batch, shape.num_kv_heads, shape.head_dim, self.model.dtype)
        floor_ms = floor_us(weight_bytes(self.model, batch) + read, self.bandwidth_gbs) / 1000
        return DecodeRow.model_construct(
            method=method,
            context=context,
            budget=budget,
            step_ms=round(timing.ms, 4),
            spread=round(timing.spread, 4),
            floor_ms=round(floor_ms, 4),
            over_floor=round(timing.ms / floor_ms, 4),
            speedup_vs_full=None,
            kv_read_fraction=round(attention.kv_read_fraction(context), 6),
            captured=self.cache.session.step is not None,
            kv="text" if isinstance(self.filling, TextKV) else "random",
        )

    def _time(self, context: int) -> Timing:
        """Time of a step from a cache of `context` tokens."""
        model, cache, settings = self.model, self.cache, self.settings
        token = self.filling.fill(cache, context)

        def decode() -> None:
            nonlocal token
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)

        return time_steps(decode, model.device, WARM_UP, settings.steps, REPEATS)


def _with_speedups(rows: list[DecodeRow]) -> list[DecodeRow]:
    """The rows of one context, compared with the faster of the full attentions among them."""
    base_ms = min((row.step_ms for row in rows if row.method in ("full", "sdpa")), default=None)
    if base_ms is None:
        return rows
    return [row.model_copy(update={"speedup_vs_full": round(base_ms / row.step_ms, 4)}) for row in rows]
