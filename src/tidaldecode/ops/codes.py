"""Codes of keys: a few bits for each channel of K, from which the scores of all cached tokens are estimated.

A key `k` is centred and turned, `x = (k - centre) · rotation`, and each channel of `x` is rounded to one of `2^bits`
odd integers `c` (its sign alone, at one bit). One factor a token, `|x|² / (x · c)`, makes `factor · (q · rotation) · c`
an unbiased estimate of `q · (k - centre)` under a random rotation (RaBitQ, Gao and Long, SIGMOD 2024). The centre adds
the same to all scores of a query and drops out of the softmax: any constant will do.

The centre is the mean of a sequence's first keys, as the cache holds them. So the codes of a prefix go by that prefix
alone: not by what comes after it, by other sequences, or by the passes in which it was read; and sequences that share
the blocks of a prefix share its codes. RoPE turns the mean of most channels away as positions grow: those have none.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tidaldecode.ops.values import CODE_BITS, KV, KeyCodes

CENTRE_TOKENS = 16
"""First keys of a sequence whose mean is the centre: as many as the smallest blocks of a paged cache hold."""

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


def room_for_codes(k: Tensor, bits: int, steady: Tensor | None = None) -> KeyCodes:
    """Room for the codes of a layer's K, [num_blocks, block_size, Hkv, D]; by default all channels have a centre.

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
            rotation(dim, k.device),
            k.new_ones(dim, dtype=torch.float32) if steady is None else steady.to(k.device),
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


_ROWS = 2**14  # keys that are coded at once, of all KV heads


def write_codes(kv: KV, new_lengths: Tensor, tokens: int) -> None:
    """Writes the codes of the keys that a pass has put into the cache.

    Of a sequence that had fewer than `CENTRE_TOKENS` all tokens are coded anew, about their centre as it is now.

    Args:
        kv: the cache with the new tokens' K and room for codes; its lengths count them.
        new_lengths: [B], int32; new tokens of each sequence.
        tokens: they are no more than these, all sequences together.
    """
    codes, block_size = kv.codes, kv.k.shape[1]
    assert codes is not None
    lengths = kv.lengths.long()
    start = lengths - new_lengths
    start = torch.where(start < CENTRE_TOKENS, 0, start)
    count = torch.where(new_lengths > 0, lengths - start, 0)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), count)  # [T]
    token = torch.arange(len(sequence), device=lengths.device) - (count.cumsum(0) - count - start)[sequence]
    centres = _centres(kv) * codes.steady
    for rows, of in zip(torch.split(token, _ROWS), torch.split(sequence, _ROWS), strict=True):
        place = kv.block_table[of, rows // block_size].long(), rows % block_size
        codes.packed[place], codes.factors[place] = encode(kv.k[place], centres[of], codes)


def _centres(kv: KV) -> Tensor:
    """The mean of each sequence's first keys, [B, Hkv, D], float32; zeros of an empty one."""
    first = torch.arange(CENTRE_TOKENS, device=kv.lengths.device)
    there = first < kv.lengths[:, None]  # [B, n]
    token = torch.where(there, first, 0)
    keys = kv.k[kv.block_table.gather(1, token // kv.k.shape[1]).long(), token % kv.k.shape[1]].float()
    total = keys.masked_fill(~there[..., None, None], 0).sum(1)
    return total / there.sum(1).clamp(min=1)[:, None, None]


def decode(packed: Tensor, factors: Tensor, bits: int) -> Tensor:
    """What codes stand for in turned channels, [..., Hkv, D], float32."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    code = (packed[..., None, :] >> shifts & (2**bits - 1)).flatten(-2)
    return (2 * code.float() + 1 - 2**bits) * factors.float()[..., None]
