"""Memory that kernels share between launches, and what they must know of the device."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

_INTERPRETED_MULTIPROCESSORS = 5  # few and odd, so that the interpreter sees splits of every kind

_zeros: dict[tuple[str, torch.device, int], list[Tensor]] = {}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; a few for Triton's interpreter on the CPU."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(batch: int) -> int:
    """The vector of sequences that a kernel for `batch` of them is compiled for: few sizes, for few compilations."""
    return next((size for size in (1, 32, 128, 512) if batch <= size), triton.next_power_of_2(batch))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Shared memory that a program can have, in bytes; a Hopper GPU's for the interpreter."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, from Hopper on).

    Every kernel that is launched so waits for the one before it (`gdc_wait`) ahead of its first load.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def zeros(name: str, size: int, device: torch.device) -> Tensor:
    """Counters that every launch leaves at zero, one buffer for each name, device and stream: [size or more], int32.

    Kernels of one stream run one after another, so they can share a buffer. Two CUDA graphs that were captured on the
    same stream must not be replayed at the same time. No buffer is ever freed: a graph may hold its address.
    """
    cuda = device.type == "cuda"
    buffers = _zeros.setdefault((name, device, torch.cuda.current_stream(device).cuda_stream if cuda else 0), [])
    if buffers and len(buffers[-1]) >= size:
        return buffers[-1]
    fresh = torch.zeros(triton.next_power_of_2(size), dtype=torch.int32, device=device)
    # what is made while a graph is captured lies in the graph's own memory, and is made anew at each replay
    if not (cuda and torch.cuda.is_current_stream_capturing()):
        buffers.append(fresh)
    return fresh
