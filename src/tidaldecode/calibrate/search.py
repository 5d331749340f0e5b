"""The search for the layers that read everything: many plans are predicted, few are tried, and the loss decides.

The prediction is the attention mass that the sparse layers lose, times a weight for each layer: how much a unit of
mass that it loses costs. The weights start out equal and are fitted to every plan that was tried, so that the
prediction gets better as the search goes on. From the plans with few such layers to those with more, one layer is added
at a time; at each size a layer moves as long as that makes the loss smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from tidaldecode.calibrate.assignment import Assignment
from tidaldecode.calibrate.weights import fitted_weights


@dataclass(frozen=True)
class Layers:
    """The layers of a plan that read everything, and those of them that choose."""

    reading: frozenset[int]
    select: frozenset[int]


@dataclass
class Search:
    """One search; it can be stopped at any time.

    Args:
        assignment: what is known of the layers; its weights are fitted as the search goes on.
        measure: the loss of a plan with these layers; infinite where there is none.
        full_layers: how many of the layers that read everything may not choose; 0 lets all of them.
        tries: plans that are tried in a row without finding a better one, before a size is given up.
        most_tries: plans that are tried at a size in all.

    Attributes:
        measured: the loss of each plan that was tried.
    """

    assignment: Assignment
    measure: Callable[[Layers], float]
    full_layers: int = 0
    tries: int = 12
    most_tries: int = 48
    measured: dict[Layers, float] = field(default_factory=dict)

    def sizes(self, first: int, last: int) -> Iterator[Layers]:
        """The best layers found of each size, one size after another.

        Args:
            first, last: how many layers read everything.
        """
        best = self.start(first)
        for size in range(first, last + 1):
            self._end = len(self.measured) + self.most_tries
            for layers in [best] if size == first else self._untried(self._grown(best)):
                self._try(layers)
            tried = [layers for layers in self.measured if len(layers.reading) == size]
            best = self._moved(min(tried, key=self._order))
            yield best

    def start(self, size: int) -> Layers:
        """The first layers that can have a role; beyond three, those whose absence the prediction misses most."""
        layers = self.assignment.layers
        reading = frozenset(layers[: min(size, 3)])
        while len(reading) < size:
            reading = min(self._grown(self._chosen(reading)), key=self._rank).reading
        return self._chosen(reading)

    def _order(self, layers: Layers) -> tuple[float, list[int]]:
        return self.measured[layers], sorted(layers.reading)

    def _rank(self, layers: Layers) -> tuple[float, list[int]]:
        return self.assignment.predicted(layers.reading, layers.select), sorted(layers.reading)

    def _chosen(self, reading: Iterable[int]) -> Layers:
        reading = frozenset(reading)
        most = max(1, len(reading) - self.full_layers)
        return Layers(reading, self.assignment.select_layers(reading, most))

    def _others(self, layers: Layers) -> list[int]:
        return [layer for layer in self.assignment.layers if layer not in layers.reading]

    def _grown(self, layers: Layers) -> list[Layers]:
        """The same layers and one more."""
        return [self._chosen(layers.reading | {new}) for new in self._others(layers)]

    def _neighbours(self, layers: Layers) -> list[Layers]:
        """The same layers, but for one."""
        others = self._others(layers)
        return [self._chosen(layers.reading - {old} | {new}) for old in sorted(layers.reading) for new in others]

    def _moved(self, best: Layers) -> Layers:
        """Moves one layer at a time, as long as that makes the loss smaller."""
        while (better := self._better(best)) is not None:
            best = better
        return best

    def _better(self, best: Layers) -> Layers | None:
        """The best neighbour of those tried, or the first in the order of prediction that turns out to be better."""
        neighbours, loss = self._neighbours(best), self.measured[best]
        if tried := [layers for layers in neighbours if self.measured.get(layers, math.inf) < loss]:
            return min(tried, key=self._order)
        return next((layers for layers in self._untried(neighbours) if self._try(layers) < loss), None)

    def _untried(self, candidates: list[Layers]) -> Iterator[Layers]:
        """The most promising candidates that were not tried, each by the weights of that moment; `tries` of them."""
        for _ in range(self.tries):
            left = [layers for layers in candidates if layers not in self.measured]
            candidate = min(left, key=self._rank, default=None)
            if candidate is None or math.isinf(self._rank(candidate)[0]) or len(self.measured) >= self._end:
                return
            yield candidate

    def _try(self, layers: Layers) -> float:
        if layers not in self.measured:
            self.measured[layers] = self.measure(layers)
            self._fit()
        return self.measured[layers]

    def _fit(self) -> None:
        """Fits the weights to what was measured."""
        tried = [layers for layers, loss in self.measured.items() if math.isfinite(loss)]
        if not tried:
            return
        lost = [self.assignment.losses(layers.reading, layers.select) for layers in tried]
        weights = fitted_weights(lost, [self.measured[layers] for layers in tried])
        self.assignment = replace(self.assignment, weights=weights)
