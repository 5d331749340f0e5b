"""The attention of a whole decode step: all layers of a model, by each method."""

from __future__ import annotations

from collections.abc import Iterator

from tidaldecode.bench.caches import LayerCaches
from tidaldecode.bench.methods import step_attention
from tidaldecode.bench.workload import Workload
from tidaldecode.plan import TidalPlan

SDPA_STEP = "step full (sdpa)"
"""The step that the others are compared with."""

_STEPS = 4  # in a CUDA graph


def step_workloads(caches: LayerCaches, num_layers: int, budgets: tuple[int | float, ...]) -> Iterator[Workload]:
    """The attention of a decode step of `num_layers` layers, one method after the other.

    Quest keeps layers 0 and 1 full, as the paper's plan does; StreamingLLM none.
    """
    paper = TidalPlan.paper(num_layers)
    unified = TidalPlan.validated(**{**paper.model_dump(), "selection": "unified"})
    yield _step(caches, num_layers, SDPA_STEP, "sdpa", paper, None)
    yield _step(caches, num_layers, "step full", "full", paper, None)
    for budget in budgets:
        yield _step(caches, num_layers, "step tidal", "tidal", paper, budget)
        yield _step(caches, num_layers, "step tidal unified", "tidal", unified, budget)
        yield _step(caches, num_layers, "step quest", "quest", paper, budget)
        yield _step(caches, num_layers, "step streaming", "streaming", paper, budget)


def _step(
    caches: LayerCaches, num_layers: int, name: str, method: str, plan: TidalPlan, budget: int | float | None
) -> Workload:
    shape = caches.shape
    attention = step_attention(method, plan, shape.model(num_layers), budget, shape.context)
    attention.begin(caches.lengths, shape.context)
    for layer in range(num_layers):
        attention.prepare(layer, caches.kv(layer % len(caches)))

    def step() -> None:
        for layer in range(num_layers):
            attention.attend(layer, *caches.inputs(layer % len(caches)))

    reads = (min(tokens, shape.context) for tokens in attention.tokens_read(shape.context).values())
    return Workload(name, budget, shape.kv_bytes(sum(reads)), [step] * _STEPS)
