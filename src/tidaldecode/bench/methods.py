"""The methods that are timed: those that are compared in quality, and PyTorch's own attention."""

from __future__ import annotations

from tidaldecode.bench.sdpa import SdpaAttention
from tidaldecode.methods.method import Method
from tidaldecode.methods.tidal import Attention
from tidaldecode.plan import ModelShape, TidalPlan, tokens_of


def step_attention(
    method: str, plan: TidalPlan, shape: ModelShape, budget: int | float | None, context: int
) -> Attention:
    """The attention of a method; Quest's pages are of 16 tokens, or of fewer where a budget is less than two of them.

    Args:
        method: one of `TIMED_METHODS`.
        plan: of `tidal`.
        shape: heads and layers of the model.
        budget: tokens, or a fraction of the context; of a method that has a budget.
        context: tokens in the cache.
    """
    if method == "sdpa":
        return SdpaAttention(TidalPlan.full(shape.num_layers), shape, context)
    if method == "full":
        return Method(method).attention(shape, context)
    assert budget is not None
    half = max(1, tokens_of(budget, context) // 2)
    page_size = min(16, 1 << (half.bit_length() - 1))  # two pages in the smallest budgets too
    return Method(method, budget, plan if method == "tidal" else None, page_size=page_size).attention(shape, context)
