"""`bench ops`: what each operation costs, and the attention of a decode step by each method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch

from tidaldecode import ops
from tidaldecode.bench.caches import CacheShape, LayerCaches
from tidaldecode.bench.choosing import choosing_workloads
from tidaldecode.bench.hardware import measuring
from tidaldecode.bench.layers import layer_workloads
from tidaldecode.bench.roofline import floor_us
from tidaldecode.bench.settings import OperationsSettings
from tidaldecode.bench.steps import SDPA_STEP, step_workloads
from tidaldecode.bench.timing import time_gpu
from tidaldecode.bench.timing_report import TimingReport
from tidaldecode.models import check_dtype
from tidaldecode.results.timings import OperationRow


def bench_operations(
    settings: OperationsSettings,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[str], None] = lambda what: None,
    on_report: Callable[[TimingReport[OperationRow]], None] = lambda report: None,
) -> TimingReport[OperationRow]:
    """Times every operation at every shape.

    Args:
        settings: the shapes.
        device: the GPU, or the CPU for small shapes.
        dtype: of queries and caches.
        on_progress: told, in words, what is being measured.
        on_report: called with the report so far whenever a shape is done.

    Raises:
        InputError: the GPU has no such dtype, or memory is short.
    """
    check_dtype(device, dtype)
    shapes = [
        CacheShape(settings.heads, kv_heads, settings.head_dim, settings.batch, context, dtype)
        for kv_heads in settings.kv_heads
        for context in settings.contexts
    ]
    torch.manual_seed(settings.seed)
    with measuring(device, "lower --contexts, --batch or --kv-heads"):
        for shape in shapes:  # before the first is measured
            _caches_that_fit(shape, settings, device)
        on_progress("read bandwidth")
        report = TimingReport[OperationRow].on(device, dtype).with_about(layers=settings.layers)
        for shape in shapes:
            rows = _shape_rows(shape, settings, device, report.about["read_bandwidth_gbs"], on_progress)
            report = report.with_rows(rows)
            on_report(report)
    return report


def _caches_that_fit(shape: CacheShape, settings: OperationsSettings, device: torch.device) -> int:
    least = min((b for b in settings.budgets if isinstance(b, int)), default=shape.context)
    return shape.caches_that_fit(settings.layers, min(least, shape.context), device)


def _shape_rows(
    shape: CacheShape,
    settings: OperationsSettings,
    device: torch.device,
    bandwidth_gbs: float,
    on_progress: Callable[[str], None],
) -> Iterator[OperationRow]:
    """The rows of one shape; SDPA comes first, for the others to be compared with."""
    caches = LayerCaches.random(shape, _caches_that_fit(shape, settings, device), device, settings.seed)
    workloads = chain(
        layer_workloads(caches, settings.budgets),
        choosing_workloads(caches, settings.budgets),
        step_workloads(caches, settings.layers, settings.budgets),
    )
    captured = ops.has_kernel(caches.queries[0])  # the reference asks for lengths, which no graph can
    base_us = {}
    for workload in workloads:
        on_progress(f"{workload.name}, {shape.kv_heads} KV heads, {shape.context:,} tokens")
        timing = time_gpu(workload.calls, device, captured=captured)
        if workload.name in ("sdpa", SDPA_STEP):
            base_us[workload.name] = timing.us
        is_step = workload.name.startswith("step")
        base = base_us[SDPA_STEP if is_step else "sdpa"]
        yield OperationRow.model_construct(
            operation=workload.name,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            batch=shape.batch,
            context=shape.context,
            budget=workload.budget,
            us=round(timing.us, 3),
            spread=round(timing.spread, 4),
            floor_us=round(floor_us(workload.floor_bytes, bandwidth_gbs), 3),
            over_sdpa=round(timing.us / base, 4),
            speedup_vs_full=round(base / timing.us, 4) if is_step else None,
            caches=len(caches),
            captured=captured,
        )
