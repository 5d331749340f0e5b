"""The search for the best allocation of a share of the KV cache: few are tried, each makes the prediction better."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from tidaldecode.calibrate.allocation import Allocation, Allocator
from tidaldecode.calibrate.weights import fitted_weights


@dataclass
class AllocationSearch:
    """One search; it can be stopped at any time.

    Args:
        allocator: what is known of the layers; its weights are fitted as the search goes on.
        measure: the loss of a plan with this allocation; infinite where there is none.
        tries: allocations that are tried in a row without finding a better one, before a share is given up.
        most_tries: allocations that are tried for a share in all.

    Attributes:
        measured: what was tried, and its loss.
    """

    allocator: Allocator
    measure: Callable[[Allocation], float]
    tries: int = 12
    most_tries: int = 48
    measured: list[tuple[Allocation, float]] = field(default_factory=list)

    def best_within(self, most: float) -> Allocation | None:
        """The best allocation found that reads at most a share; `None` where nothing reads so little.

        The prediction's best is tried first. Where that was tried, what differs from the best so far in one layer is.
        """
        since, number = 0, 0
        while since < self.tries and number < self.most_tries:
            candidate = self._candidate(most)
            if candidate is None:
                break
            best = self._best(most)
            loss = self.measure(candidate)
            self.measured.append((candidate, loss))
            since, number = 0 if best is None or loss < best[1] else since + 1, number + 1
            self._fit()
        found = self._best(most)
        return None if found is None else found[0]

    def _best(self, most: float) -> tuple[Allocation, float] | None:
        within = [pair for pair in self.measured if pair[0].share <= most and math.isfinite(pair[1])]
        return min(within, key=lambda pair: (pair[1], pair[0].share, pair[0].states), default=None)

    def _candidate(self, most: float) -> Allocation | None:
        """What to try next, by the weights of this moment."""
        found = self.allocator.best_within(most)
        if found is None:
            return None
        allocation, price = found
        tried = {before.key for before, _ in self.measured}
        if allocation.key not in tried:
            return allocation
        best = self._best(most)
        near = allocation if best is None else best[0]
        left = [other for other in self.allocator.changed(near, price, most) if other.key not in tried]
        return min(left, key=lambda other: (self.allocator.predicted(other), other.states), default=None)

    def _fit(self) -> None:
        known = [(torch.from_numpy(tried.losses), loss) for tried, loss in self.measured if math.isfinite(loss)]
        if known:
            weights = fitted_weights(*map(list, zip(*known, strict=True)))
            self.allocator = replace(self.allocator, weights=weights.numpy())
