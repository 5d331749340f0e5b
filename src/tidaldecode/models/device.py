"""Where a model runs, and in which dtype, if nobody says."""

from __future__ import annotations

import torch

from tidaldecode.errors import InputError

_BFLOAT16 = (8, 0)  # compute capability from which on GPUs have it


def default_device() -> torch.device:
    """The GPU if there is one, the CPU if not."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float16 on one too old for it; float32 on a CPU, where bfloat16 is slow."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= _BFLOAT16 else torch.float16


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Refuses bfloat16 on a GPU that does not have it.

    Raises:
        InputError: the compute capability is below 8.0.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _BFLOAT16:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise InputError(f"{name} has compute capability {major}.{minor}, and bfloat16 needs 8.0: give --dtype float16")
