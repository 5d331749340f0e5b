"""The arithmetic of a decode step on tensors. Knows no model and no framework.

Every operation sees the KV cache the same way, so that one set of kernels serves a contiguous cache (one block per
sequence) and a paged one:

    k_cache, v_cache   [num_blocks, block_size, Hkv, D]; any strides, rows of D contiguous
    block_table        [B, max_blocks], integer; token `t` of sequence `b` lives in block
                       `block_table[b, t // block_size]`, row `t % block_size`
    lengths            [B], int32; tokens of each sequence in the cache, those of this step included

`B` sequences, `Hq` query heads, `Hkv` KV heads, `D` the head dim. Query head `h` reads KV head `h // (Hq // Hkv)`.

`reference` holds the plain PyTorch of each operation, which every device runs and which defines what is correct;
`kernels` the same in Triton, which tensors on a GPU take where their dtype and head dim have a kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from tidaldecode.ops import reference

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_HEAD_DIM = 256

MOST_CHUNK_TOKENS = 65
"""Most new tokens that `multi_query_attention` has a kernel for: 64 drafted ones and the one before them."""


def has_kernel(rows: Tensor) -> bool:
    """Whether query, key or value rows, [..., D], have kernels: on a GPU, of a dtype and head dim that they know."""
    return rows.is_cuda and _obstacle(rows.device, rows.dtype, rows.shape[-1]) is None


@functools.cache
def _obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why there is no kernel; said once."""
    obstacle = None
    if dtype not in _KERNEL_DTYPES:
        obstacle = f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    elif head_dim > _LARGEST_HEAD_DIM:
        obstacle = f"there are no kernels for head dim {head_dim}, only up to {_LARGEST_HEAD_DIM}"
    elif torch.version.hip is not None:
        obstacle = "the kernels are made for NVIDIA GPUs"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        obstacle = f"{torch.cuda.get_device_name(device)} is too old for the kernels (compute capability below 8.0)"
    elif importlib.util.find_spec("triton") is None:
        obstacle = "Triton is not installed"
    elif not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang", "cl")))):
        obstacle = "Triton needs a C compiler, and there is none: install gcc"
    if obstacle is not None:
        logging.getLogger("tidaldecode").warning("%s: attention runs in plain PyTorch, and slower", obstacle)
    return obstacle


def _by_device(operation: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The operation by the backend of the device that its first tensor lies on."""

    @functools.wraps(operation)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not has_kernel(cast(Tensor, args[0])):
            return operation(*args, **kwargs)
        from tidaldecode.ops import kernels  # Triton is there with PyTorch's CUDA builds alone

        kernel: Callable[..., Any] = getattr(kernels, operation.__name__)
        with torch.cuda.device(cast(Tensor, args[0]).device):  # Triton launches on the current one
            return kernel(*args, **kwargs)

    return run


full_attention = _by_device(reference.full_attention)
full_attention_with_importance = _by_device(reference.full_attention_with_importance)
full_attention_with_selection = _by_device(reference.full_attention_with_selection)
multi_query_attention = _by_device(reference.multi_query_attention)
multi_query_attention_with_selection = _by_device(reference.multi_query_attention_with_selection)
sparse_attention = _by_device(reference.sparse_attention)
write_kv = _by_device(reference.write_kv)


def select_tokens(
    importance: Tensor, lengths: Tensor, budgets: Tensor, recents: Tensor, sink_tokens: int, indices: Tensor
) -> None:
    """As `reference.select_tokens`, by the backend of the device."""
    if importance.is_cuda and _obstacle(importance.device, importance.dtype, 1) is None:
        from tidaldecode.ops import kernels

        with torch.cuda.device(importance.device):
            kernels.select_tokens(importance, lengths, budgets, recents, sink_tokens, indices)
    else:
        reference.select_tokens(importance, lengths, budgets, recents, sink_tokens, indices)


__all__ = [
    "MOST_CHUNK_TOKENS",
    "full_attention",
    "full_attention_with_importance",
    "full_attention_with_selection",
    "has_kernel",
    "multi_query_attention",
    "multi_query_attention_with_selection",
    "select_tokens",
    "sparse_attention",
    "write_kv",
]
