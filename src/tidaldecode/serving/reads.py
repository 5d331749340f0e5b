"""How much of the KV cache the decode steps of an engine read: counted on the host, shown and logged."""

from __future__ import annotations

import logging
import math
import time

import numpy as np
from numpy.typing import NDArray

from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.plan import TidalPlan
from tidaldecode.serving.metrics import Counters

_log = logging.getLogger("vllm.tidaldecode")
_SECONDS = 10.0  # as often as vLLM logs its throughput


class Reads:
    """Counts the tokens whose K and V the layers with a role read, per KV head.

    Args:
        attention: a plan at work.
        told: whether to log it from time to time, and to show it on `/metrics`; one rank of all does.

    Attributes:
        tokens: tokens that were decoded.
        read: tokens that the layers read, summed over layers and decoded tokens.
        whole: tokens that full attention would have read.
    """

    def __init__(self, attention: DecodeAttention, told: bool = True) -> None:
        self._told = told
        self._counters: Counters | None = None
        self._plan: TidalPlan = attention.plan
        # at a context of 2 tokens per budget token, what depends on the length is told from what does not
        context = 2 * attention.plan.budget_for(1) + 1
        reads = attention.tokens_read(context)
        sparse = {layer for layer, role in enumerate(attention.plan.roles) if role == "sparse"}
        self._layers = len(reads)
        self._short = len(sparse)
        self._full = self._layers - self._short
        self._sparse = sum(reads[layer] for layer in sparse) / min(attention.plan.budget_for(context), context)
        self.tokens = 0
        self.read = self.whole = 0.0
        self._logged = (time.monotonic(), 0, 0.0, 0.0)

    def count(self, lengths: NDArray[np.integer]) -> None:
        """Counts a step.

        Args:
            lengths: [B]; tokens of the sequences that are decoded, the new ones included; 0 is none.
        """
        lengths = lengths[lengths > 0].astype(np.float64)
        budget, least = self._plan.token_budget, self._plan.budget_for(1)
        budgets = least if isinstance(budget, int) else np.maximum(np.ceil(lengths * budget), least)
        short = budgets >= lengths
        sparse = np.where(short, lengths * self._short, budgets * self._sparse)
        read, whole = float((lengths * self._full + sparse).sum()), float((lengths * self._layers).sum())
        self.tokens += len(lengths)
        self.read += read
        self.whole += whole
        self._tell(len(lengths), read, whole)

    @property
    def fraction(self) -> float:
        """Share of the KV cache that was read; `nan` before the first step."""
        return self.read / self.whole if self.whole else math.nan

    def _tell(self, decoded: int, more_read: float, more_whole: float) -> None:
        if not self._told:
            return
        if self._counters is None:  # by the process that decodes; the plan may have been made in another
            self._counters = Counters()
        self._counters.add(decoded, more_read, more_whole)
        now = time.monotonic()
        since, tokens, read, whole = self._logged
        if now - since < _SECONDS or self.whole == whole:
            return
        part = (self.read - read) / (self.whole - whole)
        _log.info(
            "tidaldecode: %d tokens decoded since the last such line, reading %.1f%% of the KV cache; "
            "%d tokens since the start, reading %d tokens' K and V over all layers",
            self.tokens - tokens,
            100 * part,
            self.tokens,
            self.read,
        )
        self._logged = (now, self.tokens, self.read, self.whole)
