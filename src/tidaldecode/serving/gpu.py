"""What a GPU must have to serve: kernels that run in CUDA graphs, and memory."""

from __future__ import annotations

import torch

from tidaldecode import ops
from tidaldecode.errors import InputError


def check_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Refuses a GPU without kernels: plain PyTorch, which stands in for them elsewhere, runs in no CUDA graph.

    Raises:
        InputError: the GPU is too old, the head dim too large, or something that compiles kernels is missing.
    """
    found = ops.obstacle(device, dtype, head_dim) if device.type == "cuda" else None
    if found is not None:
        raise InputError(f"tidaldecode can't serve here: {found}")


def memory_left(device: torch.device, share: float) -> int | None:
    """Bytes of a GPU that are left of the share that the engine may take; `None` on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(free, free - (1 - share) * total)) + cached
