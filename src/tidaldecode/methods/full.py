"""Full attention in every layer, through the same code as the others: what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from tidaldecode.errors import InputError
from tidaldecode.methods.method import Method
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.plan import ModelShape, TidalPlan


@dataclass(frozen=True)
class Full(Method):
    """Full attention; it has no budget."""

    name = "full"

    def __post_init__(self) -> None:
        if self.budget is not None:
            raise InputError("method 'full' reads everything: leave out the budget")

    def attention(self, shape: ModelShape, context: int) -> Attention:
        """See `Method`."""
        return DecodeAttention(TidalPlan.full(shape.num_layers), shape)
