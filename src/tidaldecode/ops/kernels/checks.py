"""What kernels take for granted of their arguments: another layout would be read as something else."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(**tensors: Tensor | None) -> None:
    """Refuses tensors whose last dimension is not contiguous.

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
