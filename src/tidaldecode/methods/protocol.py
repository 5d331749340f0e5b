"""What attends in the layers of a decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from tidaldecode.ops import KV


class Attention(Protocol):
    """What attends in the layers of a decode step: a plan at work, or a method that it is compared with.

    Between two calls of `begin` with sequences as many, nothing may be allocated that outlives the step, and nothing on
    the device may be waited for: the step is captured in a CUDA graph. What outlives a step is made outside of
    inference mode, as the cache is: later steps write it, in whatever mode.
    """

    def prepare(self, layer: int, kv: KV) -> None:
        """Looks at the prompt's K of a layer, before the first step behind it. Default: keeps nothing."""
        return None

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Starts a decode step.

        Args:
            lengths: [B], int32; lengths of the sequences, the new tokens included.
            capacity: the longest that the sequences can become.
        """

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """Attention of the new tokens in one layer, after `begin`, with the layer's K and V already in the cache.

        Args:
            layer: index of the layer; layers are called in order.
            query: [B, Hq, D].
            kv: the layer's cache.
            scale: factor of the scores.

        Returns:
            [B, Hq, D], dtype of `query`.
        """
        ...

    def code_bits(self, layer: int) -> int:
        """Bits a channel of the codes of keys that a layer chooses by, in its `kv.codes`; 0 if it needs none."""
        return 0

    def is_full(self, layer: int) -> bool:
        """Whether a layer reads the whole cache and chooses nothing, so that several positions can attend at once."""
        return False

    def tokens_read(self, context: int) -> dict[int, float]:
        """Tokens whose K and V each layer with a part in it reads in one step, per KV head, at a context of so many.

        Query heads of one KV head that read different sets read them one by one, and are counted so.
        """
        ...

    def kv_read_fraction(self, context: int) -> float:
        """Share of the KV cache of these layers that one step reads; above 1 where sets of one KV head overlap."""
        reads = self.tokens_read(context)
        return sum(reads.values()) / (context * len(reads))
