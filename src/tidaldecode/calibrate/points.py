"""The plans that were tried, what they cost and lose, and which of them is the one that was asked for."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from tidaldecode.calibrate.loss import Loss
from tidaldecode.plan import TidalPlan


@dataclass(frozen=True)
class Point:
    """A plan, what it costs and what it loses.

    Attributes:
        loss: on the text that it was chosen on.
        kv_read_fraction: share of the KV cache that a step reads at a window's end.
        heldout_gap, heldout_error: nats per token above full attention on the held-out text, and the standard error
            over its windows; `None` before the check, and the error of a single window.
        heldout_surprise, heldout_surprise_error: see `Calibration`; likewise, and of the chosen plan alone.
    """

    plan: TidalPlan
    loss: Loss
    kv_read_fraction: float
    heldout_gap: float | None = None
    heldout_error: float | None = None
    heldout_surprise: float | None = None
    heldout_surprise_error: float | None = None


@dataclass
class BestPoints:
    """The best plan of each kind that was tried: of a number of layers that read everything and a budget, or a share.

    Attributes:
        max_gap: see `CalibrationSettings`.
    """

    max_gap: float | None
    best: dict[Hashable, Point] = field(default_factory=dict)

    def add(self, key: Hashable, point: Point) -> float:
        """Keeps a plan if it is the best of its kind; its loss, infinite where it overflows."""
        loss = point.loss.divergence
        if not math.isfinite(loss):
            return math.inf
        if key not in self.best or loss < self.best[key].loss.divergence:
            self.best[key] = point
        return loss

    @property
    def chosen(self) -> Point:
        """The plan that was asked for: the cheapest within the gap, or that with the least loss."""
        points, gap = list(self.best.values()), self.max_gap
        within = [] if gap is None else [point for point in points if point.loss.text_divergence <= gap]
        if within:
            return min(within, key=lambda point: (point.kv_read_fraction, point.loss.divergence))
        return min(points, key=lambda point: (point.loss.divergence, point.kv_read_fraction))

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points that lose less than every cheaper one, and the chosen one, the cheapest first."""
        least, chosen, frontier = math.inf, self.chosen, []
        for point in sorted(self.best.values(), key=lambda point: (point.kv_read_fraction, point.loss.divergence)):
            if point.loss.divergence < least or point is chosen:
                least = min(least, point.loss.divergence)
                frontier.append(point)
        return tuple(frontier)
