"""How much of the KV cache the decode steps of an engine read: counted on the host, shown and told."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.serving.metrics import Counters

_SECONDS = 10.0  # as often as vLLM logs its throughput


class ReadCounts:
    """Counts the tokens whose K and V the layers with a role read, per KV head.

    Args:
        attention: a plan at work.
        told: whether to tell of it from time to time, and to show it on `/metrics`; one rank of all does.

    Attributes:
        totals: [3], float64: tokens that were decoded; tokens that the layers read for them, summed over layers; and
            tokens that full attention would have read. In the order of `metrics.COUNTERS`.
    """

    def __init__(self, attention: DecodeAttention, told: bool = True) -> None:
        layers = [layer for layer, role in enumerate(attention.plan.roles) if role is not None]
        self._layers = len(layers)
        self._reads = Counter(attention.reads(layer) for layer in layers)  # few are different
        self.totals = np.zeros(3)
        self._told = told
        self._counters: Counters | None = None
        self._logged, self._logged_at = self.totals.copy(), time.monotonic()

    def count(self, lengths: NDArray[np.integer]) -> str | None:
        """Counts a step.

        Args:
            lengths: [B]; tokens of the sequences that are decoded, the new ones included; 0 is none.

        Returns:
            A line for the engine's log, from time to time.
        """
        lengths = lengths[lengths > 0]
        read = sum(number * reads.tokens(lengths).sum() for reads, number in self._reads.items())
        step = np.array([len(lengths), read, lengths.sum() * self._layers])
        self.totals += step
        return self._tell(step) if self._told else None

    @property
    def decoded(self) -> int:
        """Tokens that were decoded."""
        return int(self.totals[0])

    @property
    def fraction(self) -> float:
        """Share of the KV cache that was read; `nan` before the first step."""
        _, read, full = self.totals
        return read / full if full else math.nan

    def _tell(self, step: NDArray[np.float64]) -> str | None:
        if self._counters is None:  # by the process that decodes; the plan may have been made in another
            self._counters = Counters()
        self._counters.add(step)
        decoded, read, full = self.totals - self._logged
        if time.monotonic() - self._logged_at < _SECONDS or not full:
            return None
        self._logged, self._logged_at = self.totals.copy(), time.monotonic()
        return (
            f"tidaldecode: {decoded:.0f} tokens decoded since the last such line, reading {read / full:.1%} of the "
            f"KV cache; {self.decoded} tokens since the start, reading {self.totals[1]:.0f} tokens' K and V over all "
            "layers"
        )
