"""`bench decode`: whole decode steps of a model, from the embedding to the next token, by each method in one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tidaldecode.bench.hardware import GIB, check_memory, measuring
from tidaldecode.bench.methods import step_attention
from tidaldecode.bench.roofline import floor_us, kv_bytes, read_bandwidth_gbs, weight_bytes
from tidaldecode.bench.settings import REPEATS, WARM_UP, DecodeSettings
from tidaldecode.bench.timing import Timing, time_steps
from tidaldecode.errors import InputError
from tidaldecode.hf import TidalCache, apply
from tidaldecode.methods.tidal import Attention
from tidaldecode.models import check_architecture, check_dtype, check_plan, model_shape
from tidaldecode.plan import TidalPlan
from tidaldecode.plans.find import find_plan
from tidaldecode.results.environment import environment

_WORKSPACE = GIB  # activations, index sets, kernels' scratch memory
_MEND = "lower --contexts or --batch"


class BenchModel(Protocol):
    """A `tidaldecode.models.ModelFiles`, or a `tidaldecode.bench.shapes.RandomModel`."""

    @property
    def name(self) -> str: ...

    def config(self) -> PreTrainedConfig: ...

    def model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel: ...


@dataclass(frozen=True)
class DecodeRow:
    """Decode steps by one method.

    Attributes:
        context: tokens of each sequence in the cache before the first step.
        budget: tokens, or a fraction of the context; `None` for full attention.
        step_ms: median milliseconds from a token to the next, embedding and argmax included.
        spread: interquartile range over the median.
        floor_ms: milliseconds in which the weights, and the K and V that the method needs, can be read.
        over_floor: time over the floor.
        speedup_vs_full: time of the faster full attention, `full` or `sdpa`, over the method's; `None` where neither
            was measured.
        kv_read_fraction: share of the KV cache that the method reads.
        captured: whether the step ran in a CUDA graph.
    """

    method: str
    context: int
    budget: int | float | None
    step_ms: float
    spread: float
    floor_ms: float
    over_floor: float
    speedup_vs_full: float | None
    kv_read_fraction: float
    captured: bool


@dataclass(frozen=True)
class DecodeReport:
    """Rows with what they were measured on.

    Attributes:
        environment: command, versions, device.
        model: name of the model or of its shape.
        plan: of `tidal`.
        read_bandwidth_gbs: measured before, in 1e9 bytes a second.
        weight_gb: of the weights that a step reads, in 1e9 bytes.
        sets_per_kv_head: of `plan`, see `TidalPlan.sets_per_kv_head`: a budget is that of one set.
    """

    environment: dict[str, object]
    model: str
    dtype: str
    plan: str | None
    batch: int
    read_bandwidth_gbs: float
    weight_gb: float
    sets_per_kv_head: float
    rows: tuple[DecodeRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object with a list of rows."""
        fields = asdict(self)
        return {**fields.pop("environment"), **fields}


def bench_decode(
    source: BenchModel,
    settings: DecodeSettings,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[str], None] = lambda what: None,
    on_report: Callable[[DecodeReport], None] = lambda report: None,
) -> DecodeReport:
    """Times decode steps of one model by every method, all through the same cache and the same engine.

    The cache is filled with random K and V: what a step costs does not depend on what they are.

    Args:
        source: the model.
        settings: contexts, methods and budgets.
        device: the GPU, or the CPU for small shapes.
        dtype: of the model and its cache.
        on_progress: told, in words, what is being done.
        on_report: called with the report so far whenever a context is done.

    Raises:
        InputError: a setting does not fit the model, the GPU has no such dtype, or memory is short.
    """
    check_dtype(device, dtype)
    config = source.config()
    plan = _checked_plan(config, settings)
    with measuring(device, _MEND):
        check_memory(_memory(config, settings, dtype), device, f"{source.name}, batch {settings.batch}", _MEND)
        on_progress("read bandwidth")
        bandwidth_gbs = round(read_bandwidth_gbs(device), 1)
        on_progress(f"making {source.name}")
        torch.manual_seed(settings.seed)
        model = apply(source.model(device, dtype), plan)
        report = DecodeReport(
            environment=environment(device),
            model=source.name,
            dtype=str(dtype).removeprefix("torch."),
            plan=plan.name,
            batch=settings.batch,
            read_bandwidth_gbs=bandwidth_gbs,
            weight_gb=round(weight_bytes(model, settings.batch) / 1e9, 4),
            sets_per_kv_head=round(plan.sets_per_kv_head(model_shape(config)), 4),
            rows=(),
        )
        engine = _Engine(model, TidalCache(model.config, plan, settings.capacity), plan, settings, bandwidth_gbs)
        for context in settings.contexts:
            rows = []
            for method, budget in settings.runs():
                on_progress(f"{source.name}: {method}{f' {budget}' if budget else ''}, {context:,} tokens")
                rows.append(engine.measure(method, budget, context))
            report = replace(report, rows=report.rows + _with_speedups(rows))
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


def _memory(config: PreTrainedConfig, settings: DecodeSettings, dtype: torch.dtype) -> float:
    """Bytes that the weights, the cache and the work on them need."""
    shape = model_shape(config)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    tokens = shape.num_layers * settings.capacity
    cache = kv_bytes(tokens, settings.batch, shape.num_kv_heads, shape.head_dim, dtype)
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
    bandwidth_gbs: float

    def measure(self, method: str, budget: int | float | None, context: int) -> DecodeRow:
        """The row of one method at one context, its speed-up left open."""
        attention = step_attention(method, self.plan, model_shape(self.model.config), budget, context)
        self.cache.attention = attention
        timing = self._time(context)
        floor_ms = floor_us(self._floor_bytes(attention, context), self.bandwidth_gbs) / 1000
        return DecodeRow(
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
        )

    def _time(self, context: int) -> Timing:
        """Time of a step from a cache of `context` tokens."""
        model, cache, settings = self.model, self.cache, self.settings
        generator = torch.Generator(model.device).manual_seed(settings.seed)
        cache.fill(settings.batch, context, model.device, model.dtype, generator)
        token = torch.randint(model.config.vocab_size, (settings.batch, 1), generator=generator, device=model.device)

        def decode() -> None:
            nonlocal token
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)

        return time_steps(decode, model.device, WARM_UP, settings.steps, REPEATS)

    def _floor_bytes(self, attention: Attention, context: int) -> float:
        shape, batch = model_shape(self.model.config), self.settings.batch
        tokens = sum(min(tokens, context) for tokens in attention.tokens_read(context).values())
        cache = kv_bytes(tokens, batch, shape.num_kv_heads, shape.head_dim, self.model.dtype)
        return weight_bytes(self.model, batch) + cache


def _with_speedups(rows: list[DecodeRow]) -> tuple[DecodeRow, ...]:
    """The rows of one context, compared with the faster of the full attentions among them."""
    base_ms = min((row.step_ms for row in rows if row.method in ("full", "sdpa")), default=None)
    if base_ms is None:
        return tuple(rows)
    return tuple(replace(row, speedup_vs_full=round(base_ms / row.step_ms, 4)) for row in rows)
