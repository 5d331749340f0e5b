"""Memory that kernels share between launches, and what they must know of the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_INTERPRETED_MULTIPROCESSORS = 5  # few and odd, so that the interpreter sees splits of every kind

import os
_NO_PDL = bool(os.environ.get('NO_PDL'))
_zeros: dict[tuple[str, torch.device, int], Tensor] = {}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; a few for Triton's interpreter on the CPU."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, from Hopper on).

    Every kernel that is launched so waits for the one before it (`gdc_wait`) ahead of its first load.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and not _NO_PDL


def zeros(name: str, size: int, device: torch.device) -> Tensor:
    """Counters that every launch leaves at zero, one buffer for each name, device and stream: [size or more], int32.

    Kernels of one stream run one after another, so they can share a buffer. Two CUDA graphs that were captured on the
    same stream must not be replayed at the same time.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        key = (name, device, torch.cuda.current_stream(device).cuda_stream)
        found = _zeros.get(key)
        # nothing may be kept that lies in a graph's own memory: a buffer that is missing is made anew at each replay
        return found if found is not None and len(found) >= size else _new(size, device)
    key = (name, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    found = _zeros.get(key)
    if found is None or len(found) < size:
        found = _zeros[key] = _new(size, device)
    return found


def _new(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
