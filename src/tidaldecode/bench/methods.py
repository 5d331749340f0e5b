"""The methods that are compared, each as the attention of a decode step."""

from __future__ import annotations

import math

from tidaldecode.attention import Attention, DecodeAttention
from tidaldecode.baselines import QuestAttention, StreamingAttention
from tidaldecode.bench.sdpa import SdpaAttention
from tidaldecode.plan import ModelShape, TidalPlan

METHODS = ("full", "sdpa", "tidal", "quest", "streaming")
"""`full` is full attention by this package's kernel, `sdpa` by PyTorch's; the others read a token budget."""

BUDGETED = ("tidal", "quest", "streaming")
"""The methods that read a token budget."""


def step_attention(
    method: str, plan: TidalPlan, shape: ModelShape, budget: int | float | None, context: int
) -> Attention:
    """The attention of a method.

    Args:
        method: one of `METHODS`.
        plan: of `tidal`; the others go by its layers.
        shape: heads and layers of the model.
        budget: tokens, or a fraction of the context, for a method that has a budget.
        context: tokens in the cache.
    """
    layers = tuple(layer for layer, role in enumerate(plan.roles) if role is not None)
    full = TidalPlan.full(len(plan.roles), layers)
    if method == "full":
        return DecodeAttention(full, shape)
    if method == "sdpa":
        return SdpaAttention(full, shape, context)
    assert budget is not None
    tokens = tokens_of(budget, context)
    if method == "tidal":
        return DecodeAttention(plan.with_budget(tokens), shape)
    return QuestAttention(shape, tokens) if method == "quest" else StreamingAttention(shape, tokens)


def tokens_of(budget: int | float, context: int) -> int:
    """A budget in tokens at a context; at least 2, a chosen token beside the new one."""
    return budget if isinstance(budget, int) else max(2, math.ceil(budget * context))
