"""Something to time: calls, and the bytes that one of them must read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tidaldecode.bench.caches import LayerCaches
from tidaldecode.bench.timing import Call


@dataclass(frozen=True)
class Workload:
    """One operation, or the attention of one whole step.

    Attributes:
        name: of the operation.
        budget: tokens, or a fraction of the context; `None` where there is no budget.
        floor_bytes: bytes that one call must read.
        calls: like calls, each on another layer's cache.
    """

    name: str
    budget: int | float | None
    floor_bytes: float
    calls: Sequence[Call]

    @classmethod
    def on_layers(
        cls,
        caches: LayerCaches,
        name: str,
        call: Callable[[int], object],
        budget: int | float | None = None,
        floor_bytes: float | None = None,
    ) -> Workload:
        """An operation on each layer, whose index `call` takes; by default it must read all K and V of it."""
        everything = caches.shape.kv_bytes(caches.shape.context)
        calls = [partial(call, layer) for layer in range(len(caches))]
        return cls(name, budget, everything if floor_bytes is None else floor_bytes, calls)
