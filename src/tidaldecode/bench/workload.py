"""Something to time: calls, and the bytes that one of them must read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
