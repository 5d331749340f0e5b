"""The oracle: every layer reads the tokens that its own scores of the current query choose.

The best that choosing by attention scores can do at a budget, and no way to save time: the scores of the whole context
are computed first. It shows how much of a method's loss lies in the budget, and how much in the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.errors import InputError
from tidaldecode.methods.method import Method
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.step_sets import StepSets, fits, map_of_heads
from tidaldecode.ops import KV, Choice
from tidaldecode.plan import ModelShape, Selection
from tidaldecode.rules import RULES


@dataclass(frozen=True)
class Oracle(Method):
    """The oracle.

    Attributes:
        selection: whose scores choose, as in a plan.
        full_layers: how many of the first layers read everything.
    """

    name = "oracle"
    selection: Selection = "per_head"
    full_layers: int = 0

    def __post_init__(self) -> None:
        if self.selection not in RULES:
            raise InputError(f"selection {self.selection!r} is unknown: give one of {', '.join(RULES)}")
        super().__post_init__()

    @property
    def kind(self) -> str:
        """The rule of the choice."""
        return self.selection

    def settings(self) -> dict[str, str | int | None]:
        """See `Method`."""
        return {"selection": self.selection, "full_layers": self.full_layers or None}

    def reading(self, shape: ModelShape, tokens: int) -> Attention:
        """See `Method`."""
        return OracleAttention(shape, tokens, self.selection, self.full_layers)

    def sets_per_kv_head(self, shape: ModelShape) -> float:
        """See `Method`."""
        return shape.sets_per_kv_head(self.selection)


class OracleAttention(Attention):
    """Attention over each layer's own exact top-k; the new token is one of them, and there are no sinks.

    Args:
        shape: heads and layers of the model.
        token_budget: tokens that a layer reads, the new token included; at least 2.
        selection: whose scores choose, as in a plan.
        full_layers: how many of the first layers read everything.
    """

    def __init__(
        self, shape: ModelShape, token_budget: int, selection: Selection = "per_head", full_layers: int = 0
    ) -> None:
        self.shape = shape
        self.full_layers = full_layers
        self.token_budget = token_budget
        self.selection = selection
        self._sets: StepSets | None = None
        self._capacity = 0

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Counts the tokens of a step."""
        sets = self._sets
        width = min(self.token_budget, capacity)
        if sets is None or not fits(sets.indices, lengths, width):
            with torch.inference_mode(False):
                choice = Choice.alike(lengths, self.token_budget)
                sets = StepSets.room(lengths, self.shape.num_sets(self.selection), width, choice)
                self._head_to_set = map_of_heads(self.shape, self.selection, lengths.device)
            self._sets = sets
        self._capacity = capacity
        sets.count(lengths)

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """See `Attention`."""
        if self.is_full(layer):
            return ops.full_attention(query, kv, scale)
        assert self._sets is not None
        indices, counts, choice = self._sets.indices, self._sets.counts, self._sets.choice
        ops.full_attention_with_selection(query, kv, scale, [self.selection], choice, self._capacity, indices)
        return ops.sparse_attention(query, kv, indices, counts, self._head_to_set, scale)

    def is_full(self, layer: int) -> bool:
        """Whether a layer is one of those that read everything."""
        return layer < self.full_layers

    def tokens_read(self, context: int) -> dict[int, float]:
        """See `Attention`: once the tokens are chosen."""
        sets = self.shape.sets_per_kv_head(self.selection)
        reads = self.token_budget * sets if self.token_budget < context else context
        return {layer: context if self.is_full(layer) else reads for layer in range(self.shape.num_layers)}
