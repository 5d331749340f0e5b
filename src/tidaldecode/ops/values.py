"""What travels through the operations of a decode step: a layer's KV cache, and how many tokens are chosen from it.

Both are checked once, where they are made, so that no kernel reads a tensor as something else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CODE_BITS = (1, 2, 4)
"""Bits of a channel that keys may be coded with."""


def code_bytes(bits: int, dim: int) -> int:
    """Bytes of the code of a key of `dim` channels, and of its factor; none of 0 bits."""
    return dim * bits // 8 + 2 if bits else 0


def code_share(bits: int, dim: int) -> float:
    """`code_bytes` over the bytes of a token's K and V of so many channels each, in 16 bits."""
    return code_bytes(bits, dim) / (4 * dim)


@dataclass(frozen=True, slots=True, eq=False)
class KeyCodes:
    """Codes of the keys of one layer, in the blocks of its K and V.

    Attributes:
        packed: [num_blocks, block_size, Hkv, W], uint8, W = D · bits / 8. Bits `s · bits` and up of byte `w` are
            the code of channel `s · W + w`: `u` for the odd integer `2u + 1 - 2^bits`.
        factors: [num_blocks, block_size, Hkv], float16.
        rotation: [D, D], float32.
        steady: [D], float32; 1 for the channels that have a centre, 0 for those whose keys are coded as they are.

    Raises:
        ValueError: a tensor is not so, by its name, or there are no codes of so many bits.
    """

    packed: Tensor
    factors: Tensor
    rotation: Tensor
    steady: Tensor

    def __post_init__(self) -> None:
        packed, factors, dim = self.packed, self.factors, self.rotation.shape[0]
        if packed.dim() != 4 or packed.dtype != torch.uint8:
            raise ValueError(f"packed is {kind(packed)}, not [num_blocks, block_size, Hkv, W] of uint8")
        if packed.shape[3] * 8 % dim or self.bits not in CODE_BITS:
            raise ValueError(f"packed is {kind(packed)}: {dim} channels have no codes of as many bytes")
        if factors.shape != packed.shape[:3] or factors.dtype != torch.float16:
            raise ValueError(f"factors is {kind(factors)}, not {list(packed.shape[:3])} of float16")
        if self.rotation.shape != (dim, dim) or self.steady.shape != (dim,):
            raise ValueError(f"rotation is {kind(self.rotation)}, steady {kind(self.steady)}: not [D, D], [D]")
        check_rows(packed=packed, rotation=self.rotation)

    @property
    def bits(self) -> int:
        """Bits of a channel."""
        return self.packed.shape[3] * 8 // self.rotation.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class KV:
    """The KV cache of one layer, contiguous (one block per sequence) or paged.

    Attributes:
        k, v: [num_blocks, block_size, Hkv, D]; any strides, rows of D contiguous on a GPU.
        block_table: [B, max_blocks], integer; token `t` of sequence `b` lives in block
            `block_table[b, t // block_size]`, row `t % block_size`.
        lengths: [B], int32; tokens of each sequence in the cache, those of this step included.
        codes: of K, in the same blocks, if there are any.

    Raises:
        ValueError: a tensor is not so, by its name.
    """

    k: Tensor
    v: Tensor
    block_table: Tensor
    lengths: Tensor
    codes: KeyCodes | None = None

    def __post_init__(self) -> None:
        k, v, table, lengths = self.k, self.v, self.block_table, self.lengths  # made once a layer: only cheap checks
        device = k.device
        if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype:
            raise ValueError(
                f"k is {kind(k)}, v is {kind(v)}: both must be [num_blocks, block_size, Hkv, D], of one dtype"
            )
        if table.dim() != 2 or table.is_floating_point():
            raise ValueError(f"block_table is {kind(table)}, not [B, max_blocks] of integers")
        if lengths.dim() != 1 or lengths.size(0) > table.size(0) or lengths.dtype != torch.int32:
            raise ValueError(f"lengths is {kind(lengths)}, not [B] of int32 with a row of block_table each")
        if not device == v.device == table.device == lengths.device:
            raise ValueError(f"k, v, block_table and lengths lie on {[str(t.device) for t in (k, v, table, lengths)]}")
        if device.type != "cpu":  # plain PyTorch reads rows of any stride, such as those of vLLM's cache on a CPU
            check_rows(k=k, v=v)
        if table.stride(1) != 1 or lengths.stride(0) != 1:
            check_rows(block_table=table, lengths=lengths)

    def of(self, rows: slice | Tensor) -> KV:
        """The cache of some of the sequences."""
        return replace(self, block_table=self.block_table[rows], lengths=self.lengths[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How many tokens are chosen for each sequence, and which of them whatever their importance.

    Attributes:
        budgets: [B], int32; tokens to choose, at least `sinks + recents + 1`.
        recents: [B], int32; last tokens that are always chosen.
        sinks: first tokens that are always chosen.

    Raises:
        ValueError: a tensor is not so, by its name.
    """

    budgets: Tensor
    recents: Tensor
    sinks: int = 0

    def __post_init__(self) -> None:
        for name, tensor in (("budgets", self.budgets), ("recents", self.recents)):
            if tensor.ndim != 1 or len(tensor) != len(self.budgets) or tensor.dtype != torch.int32:
                raise ValueError(f"{name} is {kind(tensor)}, not [B] of int32")
        check_rows(budgets=self.budgets, recents=self.recents)

    @classmethod
    def alike(cls, lengths: Tensor, budget: int, recent: int = 1, sinks: int = 0) -> Choice:
        """The same for each of the sequences whose lengths, [B], int32, are given."""
        return cls(torch.full_like(lengths, budget), torch.full_like(lengths, recent), sinks)

    def of(self, rows: slice | Tensor) -> Choice:
        """The choice for some of the sequences."""
        return Choice(self.budgets[rows], self.recents[rows], self.sinks)


def check_rows(**tensors: Tensor | None) -> None:
    """Refuses tensors whose last dimension is not contiguous: kernels would read them as something else.

    Raises:
        ValueError: one is not, by its name.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has a last stride of {tensor.stride(-1)}, not 1: pass {name}.contiguous()")


def check_float32(**tensors: Tensor) -> None:
    """Refuses tensors of another dtype than float32.

    Raises:
        ValueError: one is, by its name.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, not float32: pass {name}.float()")


def kind(tensor: Tensor) -> str:
    """Shape and dtype of a tensor, for messages."""
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
