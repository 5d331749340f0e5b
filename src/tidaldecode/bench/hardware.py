"""What the benchmarks must know of the machine: that it has a GPU, its L2 cache, its free memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from tidaldecode.errors import InputError, MemoryShortError

GIB = 2**30


def l2_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache; 0 on a CPU, where small sizes are timed as they come."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps in reserve is free
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), sys.maxsize)


def check_memory(needed: float, device: torch.device, what: str, mend: str) -> None:
    """Refuses what does not fit, before it is allocated.

    Args:
        needed: bytes.
        what: what needs them.
        mend: what to do about it.

    Raises:
        MemoryShortError: fewer bytes are free.
    """
    free = free_bytes(device)
    if needed > free:
        raise MemoryShortError(
            f"{what}: {needed / GIB:.1f} GiB of memory are needed, {free / GIB:.1f} GiB are free on {device}: {mend}"
        )


@contextmanager
def measuring(device: torch.device, mend: str) -> Iterator[None]:
    """Measures on a device, without gradients; memory that runs out is an error of the input.

    Raises:
        InputError: memory ran out.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.no_grad():
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise InputError(f"memory ran out on {device}: {mend}") from error
