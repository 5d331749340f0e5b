"""K and V of several layers, filled with random numbers: what the operations are timed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode.bench.hardware import check_memory, free_bytes
from tidaldecode.bench.roofline import kv_bytes
from tidaldecode.bench.timing import rotated_buffers
from tidaldecode.ops import KV
from tidaldecode.plan import ModelShape

_MEND = "lower --contexts, --batch or --kv-heads"


@dataclass(frozen=True)
class CacheShape:
    """One layer's attention: `heads` query heads over a cache of `context` tokens for each of `batch` sequences."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int
    dtype: torch.dtype

    def kv_bytes(self, tokens: float) -> float:
        """Bytes of K and V of `tokens` tokens per KV head, of all sequences."""
        return kv_bytes(tokens, self.batch, self.kv_heads, self.head_dim, self.dtype)

    def model(self, num_layers: int) -> ModelShape:
        """The shape of a model with such layers."""
        return ModelShape(
            num_layers=num_layers,
            num_query_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )

    def _scores_bytes(self) -> int:
        return self.batch * self.heads * self.context * 4

    def caches_that_fit(self, num_layers: int, least_tokens: int, device: torch.device) -> int:
        """How many layer caches to allocate.

        One for each layer of a step, more where the L2 cache would hold on to what calls that read `least_tokens`
        tokens leave there, fewer where memory is short; two at least.

        Raises:
            InputError: two do not fit.
        """
        one = self.kv_bytes(self.context)
        beside = 4 * self._scores_bytes() + num_layers * one / 8  # importances and what kernels need; Quest's bounds
        what = f"{self.kv_heads} KV heads, {self.context} tokens, batch {self.batch}"
        check_memory(2 * one + beside, device, what, _MEND)
        wanted = max(num_layers, rotated_buffers(self.kv_bytes(least_tokens), device))
        return max(2, min(wanted, int((0.9 * free_bytes(device) - beside) / one)))


@dataclass(frozen=True)
class LayerCaches:
    """Caches of several layers, each full of tokens, and a query for each.

    Attributes:
        keys, values: of each layer [B, Hkv, T, D], contiguous.
        queries: of each layer [B, Hq, D].
        block_table: [B, 1], int32; one block per sequence.
        lengths: [B], int32; all T.
    """

    shape: CacheShape
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    block_table: Tensor
    lengths: Tensor

    @classmethod
    def random(cls, shape: CacheShape, count: int, device: torch.device, seed: int) -> LayerCaches:
        """`count` caches of independent standard normal numbers."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.empty(size, dtype=shape.dtype, device=device).normal_(generator=generator)

        kv = (shape.batch, shape.kv_heads, shape.context, shape.head_dim)
        return cls(
            shape=shape,
            keys=[normal(*kv) for _ in range(count)],
            values=[normal(*kv) for _ in range(count)],
            queries=[normal(shape.batch, shape.heads, shape.head_dim) for _ in range(count)],
            block_table=torch.arange(shape.batch, dtype=torch.int32, device=device)[:, None],
            lengths=torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device),
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.shape.head_dim**-0.5

    def kv(self, layer: int) -> KV:
        """A layer's cache as the operations take it: one block per sequence, [B, T, Hkv, D]."""
        return KV(self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2), self.block_table, self.lengths)

    def inputs(self, layer: int) -> tuple[Tensor, KV, float]:
        """A layer's query, cache and factor of the scores, as attention takes them."""
        return self.queries[layer], self.kv(layer), self.scale
