"""What of vLLM's features TidalDecode can't work with: refused when the model is loaded, never inside a request."""

from __future__ import annotations

from typing import Any

import torch

from tidaldecode import ops
from tidaldecode.errors import InputError

_CACHE_DTYPES = ("auto", "bfloat16", "float16")


def check_engine(config: Any) -> None:
    """Refuses an engine's configuration (`VllmConfig`).

    Raises:
        InputError: speculative decoding, decode or prefill context parallelism, pipeline parallelism, dual-batch
            overlap, KV heads on more than one rank, or a model with latent attention or R-SWA.
    """
    parallel = config.parallel_config
    obstacles = {
        "speculative decoding: start without --speculative-config": config.speculative_config is not None,
        "decode context parallelism: start with --decode-context-parallel-size 1": (
            parallel.decode_context_parallel_size > 1
        ),
        "prefill context parallelism: start with --prefill-context-parallel-size 1": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "pipeline parallelism: start with --pipeline-parallel-size 1, and --tensor-parallel-size for more GPUs": (
            parallel.pipeline_parallel_size > 1
        ),
        "dual-batch overlap: start without --enable-dbo": parallel.use_ubatching,
        "multi-head latent attention (MLA)": config.model_config.use_mla,
        "reference sliding window attention": config.model_config.rswa_window is not None,
    }
    for obstacle, met in obstacles.items():
        if met:
            raise InputError(f"tidaldecode can't work with {obstacle}")


def check_layer(kv_cache_dtype: str, attn_type: str, features: dict[str, Any]) -> None:
    """Refuses an attention layer.

    Args:
        kv_cache_dtype, attn_type: as vLLM passes them to a backend.
        features: what else it passes, by name; none may be set.

    Raises:
        InputError: a quantized KV cache, attention of an encoder, or a feature that our kernels don't have.
    """
    if kv_cache_dtype not in _CACHE_DTYPES:
        raise InputError(
            f"tidaldecode has no kernels for a KV cache of {kv_cache_dtype}: start with --kv-cache-dtype auto, or "
            "bfloat16 if the checkpoint asks for another"
        )
    if attn_type != "decoder":
        raise InputError(f"tidaldecode can't work with attention of type {str(attn_type).lower()}")
    for feature, value in features.items():
        if value is not None:
            raise InputError(f"tidaldecode can't work with attention with {feature}")


def check_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Refuses a GPU without kernels: plain PyTorch, which stands in for them elsewhere, runs in no CUDA graph.

    Raises:
        InputError: the GPU is too old, the head dim too large, or something that compiles kernels is missing.
    """
    found = ops.obstacle(device, dtype, head_dim) if device.type == "cuda" else None
    if found is not None:
        raise InputError(f"tidaldecode can't serve here: {found}")
