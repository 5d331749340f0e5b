"""The methods that are timed: those that are compared in quality, and PyTorch's own attention, the baseline."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tidaldecode.methods.method import Method
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.ops import KV
from tidaldecode.plan import ModelShape, TidalPlan, tokens_of


def sdpa(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of one new token per sequence over all tokens.

    Args:
        query: [B, Hq, D].
        keys, values: [B, Hkv, T, D].
        scale: factor of the scores.

    Returns:
        [B, Hq, D].
    """
    return scaled_dot_product_attention(query[:, :, None], keys, values, scale=scale, enable_gqa=True)[:, :, 0]


class SdpaAttention(DecodeAttention):
    """A step of full attention by PyTorch's `scaled_dot_product_attention`, over a fixed number of tokens.

    SDPA takes lengths from the shapes of its inputs, so that a captured step can't follow the context as it grows:
    every step reads the first `context` tokens.

    Args:
        shape: heads and layers of the model.
        context: tokens to attend to.
    """

    def __init__(self, shape: ModelShape, context: int) -> None:
        super().__init__(TidalPlan.full(shape.num_layers), shape)
        self.context = context

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """As `DecodeAttention.attend`, for a contiguous cache; its lengths are not read."""
        keys, values = (cache[:, : self.context].transpose(1, 2) for cache in (kv.k, kv.v))  # [B, Hkv, T, D]
        return sdpa(query, keys, values, scale)


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
        return SdpaAttention(shape, context)
    if method == "full":
        return Method.named(method).attention(shape, context)
    assert budget is not None
    half = max(1, tokens_of(budget, context) // 2)
    page_size = min(16, 1 << (half.bit_length() - 1))  # two pages in the smallest budgets too
    return Method.named(method, budget, plan=plan, page_size=page_size).attention(shape, context)
