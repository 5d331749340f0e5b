"""Full attention by PyTorch's own kernel, the baseline."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.ops import KV
from tidaldecode.plan import ModelShape, TidalPlan


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
        plan: a plan with `full` layers alone.
        shape: heads and layers of the model.
        context: tokens to attend to.
    """

    def __init__(self, plan: TidalPlan, shape: ModelShape, context: int) -> None:
        super().__init__(plan, shape)
        self.context = context

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """As `DecodeAttention.attend`, for a contiguous cache; its lengths are not read."""
        keys, values = (cache[:, : self.context].transpose(1, 2) for cache in (kv.k, kv.v))  # [B, Hkv, T, D]
        return sdpa(query, keys, values, scale)
