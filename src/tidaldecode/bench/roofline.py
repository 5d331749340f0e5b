"""The floor of a time: bytes that must be read, over the bandwidth at which the device reads them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.bench.hardware import GIB, free_bytes
from tidaldecode.bench.timing import time_gpu

_BYTES = {"cuda": 4 * GIB, "cpu": GIB // 8}
_ROW = 2**16  # numbers


def read_bandwidth_gbs(device: torch.device) -> float:
    """Read bandwidth of the device's memory in GB/s (1e9 bytes): the faster of two sums over 4 GiB (CPU: 128 MiB)."""
    count = min(_BYTES[device.type], free_bytes(device) // 2) // (4 * _ROW) * _ROW
    numbers = torch.empty(count, dtype=torch.float32, device=device).normal_()
    sums: list[partial[Tensor]] = [partial(torch.sum, numbers), partial(torch.sum, numbers.view(-1, _ROW), dim=1)]
    best_ms = min(time_gpu([one], device).ms for one in sums)
    return 4 * count / best_ms / 1e6


def floor_us(num_bytes: float, bandwidth_gbs: float) -> float:
    """Microseconds in which the bytes can be read."""
    return num_bytes / bandwidth_gbs / 1000


def kv_bytes(tokens: float, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> float:
    """Bytes of K and V of `tokens` tokens per KV head, in one layer of all sequences."""
    return 2 * tokens * batch * kv_heads * head_dim * dtype.itemsize


def weight_bytes(model: PreTrainedModel, batch: int) -> float:
    """Bytes of the parameters that a decode step reads.

    An embedding that is not the output projection too gives a row a sequence, which is nothing; of a layer's experts
    at most those that the batch's tokens are routed to are read.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    share = _expert_share(model, batch)
    total = 0.0
    for name, weight in model.named_parameters():  # tied ones once
        if weight is embedding and weight is not head:
            continue
        total += weight.numel() * weight.element_size() * (share if ".experts." in name else 1)
    return total


def _expert_share(model: PreTrainedModel, batch: int) -> float:
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return min(1.0, batch * config.num_experts_per_tok / experts) if experts else 1.0
