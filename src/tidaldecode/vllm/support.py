"""What of vLLM's features TidalDecode can't work with: refused when the model is loaded, never inside a request."""

from __future__ import annotations

from typing import Any

from tidaldecode.errors import InputError

_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32")


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
            f"tidaldecode has no kernels for a KV cache of {kv_cache_dtype}: start with --kv-cache-dtype auto"
        )
    if attn_type != "decoder":
        raise InputError(f"tidaldecode can't work with {attn_type} attention")
    for feature, value in features.items():
        if value is not None:
            raise InputError(f"tidaldecode can't work with attention with {feature}")
