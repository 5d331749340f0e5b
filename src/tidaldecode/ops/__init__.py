"""The arithmetic of a decode step on tensors. Knows no model and no framework.

Every operation sees the KV cache the same way, as `KV`, so that one set of kernels serves a contiguous cache (one block
per sequence) and a paged one. How many tokens are chosen is a `Choice`.

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

from tidaldecode.ops import codes, reference
from tidaldecode.ops.values import KV, Choice, KeyCodes

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_HEAD_DIM = 256

MOST_CHUNK_TOKENS = 65
"""Most new tokens that `multi_query_attention` has a kernel for: 64 drafted ones and the one before them."""


def has_kernel(rows: Tensor) -> bool:
    """Whether query, key or value rows, [..., D], have kernels: on a GPU, of a dtype and head dim that they know."""
    return rows.is_cuda and _told_obstacle(rows.device, rows.dtype, rows.shape[-1]) is None


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a GPU has no kernels for such query, key and value rows, in words; `None` if it has."""
    if dtype not in _KERNEL_DTYPES:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    if head_dim > _LARGEST_HEAD_DIM:
        return f"there are no kernels for head dim {head_dim}, only up to {_LARGEST_HEAD_DIM}"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is too old for the kernels (compute capability below 8.0)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang", "cl")))):
        return "Triton needs a C compiler, and there is none: install gcc"
    return None


@functools.cache
def _told_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """As `obstacle`, and said once."""
    found = obstacle(device, dtype, head_dim)
    if found is not None:
        logging.getLogger("tidaldecode").warning("%s: attention runs in plain PyTorch, and slower", found)
    return found


def _by_device(operation: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The operation by the backend of the device that its first tensor, or the cache that it is given, lies on."""

    @functools.wraps(operation)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = args[0].k if isinstance(args[0], KV) else cast(Tensor, args[0])
        if not has_kernel(first):
            return operation(*args, **kwargs)
        from tidaldecode.ops import kernels  # Triton is there with PyTorch's CUDA builds alone

        kernel: Callable[..., Any] = getattr(kernels, operation.__name__)
        with torch.cuda.device(first.device):  # Triton launches on the current one
            return kernel(*args, **kwargs)

    return run


full_attention = _by_device(reference.full_attention)
full_attention_with_importance = _by_device(reference.full_attention_with_importance)
full_attention_with_selection = _by_device(reference.full_attention_with_selection)
multi_query_attention = _by_device(reference.multi_query_attention)
multi_query_attention_with_selection = _by_device(reference.multi_query_attention_with_selection)
sparse_attention = _by_device(reference.sparse_attention)
write_kv = _by_device(reference.write_kv)
write_codes = _by_device(codes.write_codes)
choose_by_codes = _by_device(reference.choose_by_codes)
importance_by_codes = _by_device(reference.importance_by_codes)


def select_tokens(importance: Tensor, lengths: Tensor, choice: Choice, indices: Tensor) -> None:
    """As `reference.select_tokens`, by the backend of the device."""
    if importance.is_cuda and _told_obstacle(importance.device, importance.dtype, 1) is None:
        from tidaldecode.ops import kernels

        with torch.cuda.device(importance.device):
            kernels.select_tokens(importance, lengths, choice, indices)
    else:
        reference.select_tokens(importance, lengths, choice, indices)


__all__ = [
    "KV",
    "MOST_CHUNK_TOKENS",
    "Choice",
    "KeyCodes",
    "choose_by_codes",
    "full_attention",
    "full_attention_with_importance",
    "full_attention_with_selection",
    "has_kernel",
    "importance_by_codes",
    "multi_query_attention",
    "multi_query_attention_with_selection",
    "obstacle",
    "select_tokens",
    "sparse_attention",
    "write_codes",
    "write_kv",
]
