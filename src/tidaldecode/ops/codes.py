"""Codes of keys: a few bits for each channel of K, from which the scores of all cached tokens are estimated.

A key `k` is centred and turned, `x = (k - centre) · rotation`, and each channel of `x` is rounded to one of `2^bits`
odd integers `c` (its sign alone, at one bit). One factor a token, `|x|² / (x · c)`, makes `factor · (q · rotation) · c`
an unbiased estimate of `q · (k - centre)` under a random rotation (RaBitQ, Gao and Long, SIGMOD 2024). The centre adds
the same to all scores of a query and drops out of the softmax: any constant will do, and the mean of the keys is best.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tidaldecode.ops.values import CODE_BITS, KeyCodes

STEPS = {1: 2.0, 2: 0.9957, 4: 0.3352}
"""By bits: the step of the uniform quantizer that loses least of a normal variable of variance 1 (Max 1960)."""


_ALIGNED = 16
"""A head's codes lie together, and begin at multiples of so many tokens: kernels read them as vectors."""


@functools.cache
def rotation(dim: int, device: torch.device) -> Tensor:
    """A fixed random rotation, [dim, dim], float32: of orthonormal rows, the same in every process."""
    normal = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(normal)
    with torch.inference_mode(False):
        return (q * r.diagonal().sign()).float().contiguous().to(device)


def room_for_codes(k: Tensor, bits: int, batch: int) -> KeyCodes:
    """Room for the codes of a layer's K, [num_blocks, block_size, Hkv, D], of `batch` sequences; centres are zero.

    Raises:
        ValueError: there are no codes of so many bits for such keys.
    """
    *blocks, tokens, heads, dim = k.shape
    if bits not in CODE_BITS or dim * bits % 8:
        raise ValueError(f"there are no codes of {bits} bits for head dim {dim}")
    room = *blocks, heads, -(-tokens // _ALIGNED) * _ALIGNED
    with torch.inference_mode(False):
        return KeyCodes(
            k.new_zeros(*room, dim * bits // 8, dtype=torch.uint8)[..., :tokens, :].transpose(-3, -2),
            k.new_zeros(room, dtype=torch.float16)[..., :tokens].transpose(-2, -1),
            k.new_zeros(batch, heads, dim, dtype=torch.float32),
            rotation(dim, k.device),
        )


def encode(keys: Tensor, centre: Tensor, codes: KeyCodes) -> tuple[Tensor, Tensor]:
    """Codes of keys.

    Args:
        keys: [..., Hkv, D].
        centre: [..., Hkv, D]; what is subtracted.
        codes: of which bits and rotation are taken.

    Returns:
        packed [..., Hkv, W], uint8, and factors [..., Hkv], float16.
    """
    bits = codes.bits
    turned = (keys.float() - centre) @ codes.rotation
    norm = turned.square().sum(-1)
    step = (STEPS[bits] * (norm / keys.shape[-1]).sqrt())[..., None]
    code = (turned / step.clamp(min=torch.finfo(torch.float32).tiny)).floor() + 2 ** (bits - 1)
    code = code.clamp(0, 2**bits - 1)
    along = (turned * (2 * code + 1 - 2**bits)).sum(-1)
    factors = torch.where(norm > 0, norm / along, 0.0).half()
    fields = code.to(torch.uint8).unflatten(-1, (8 // bits, -1))  # [..., fields, W]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=keys.device)[:, None]
    return (fields << shifts).sum(-2, dtype=torch.uint8), factors


def turned_query(query: Tensor, codes: KeyCodes) -> tuple[Tensor, Tensor]:
    """A query as codes are scored with it: turned, and rounded to integers up to 127.

    The rounding adds less than a hundredth of what codes of four bits leave uncertain.

    Args:
        query: [..., D].
        codes: whose rotation is taken.

    Returns:
        int8 numbers [..., D], and what one of them stands for, [...], float32.
    """
    turned = query.float() @ codes.rotation
    most = turned.abs().amax(-1).clamp(min=1e-30)
    return (turned * (127 / most)[..., None]).round().to(torch.int8), most / 127


def decode(packed: Tensor, factors: Tensor, bits: int) -> Tensor:
    """What codes stand for in turned channels, [..., Hkv, D], float32."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    code = (packed[..., None, :] >> shifts & (2**bits - 1)).flatten(-2)
    return (2 * code.float() + 1 - 2**bits) * factors.float()[..., None]
