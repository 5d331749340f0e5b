"""What of vLLM's features TidalDecode can't work with: refused when the model is loaded, never inside a request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tidaldecode.errors import InputError
from tidaldecode.serving.rank import RankAttention

_CACHE_DTYPES = ("auto", "bfloat16", "float16")
_FEATURES = {
    "alibi_slopes": "ALiBi",
    "logits_soft_cap": "soft-capped scores",
    "sinks": "sinks",
    "kv_sharing_target_layer_name": "the KV cache of another layer",
}
"""What our kernels don't have, by the names of vLLM's arguments."""


def check_engine(config: Any) -> None:
    """Refuses an engine's configuration (`VllmConfig`).

    Raises:
        InputError: speculative decoding, decode or prefill context parallelism, pipeline parallelism, dual-batch
            overlap, batch invariance, or a model with latent attention or R-SWA.
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
        "VLLM_BATCH_INVARIANT=1, for how a sequence is cut goes by the lengths of all: unset it, or start without "
        "--attention-backend CUSTOM": os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"),
        "multi-head latent attention (MLA)": config.model_config.use_mla,
        "reference sliding window attention": config.model_config.rswa_window is not None,
    }
    for obstacle, met in obstacles.items():
        if met:
            raise InputError(f"tidaldecode can't work with {obstacle}")


def check_layer(given: Mapping[str, Any]) -> None:
    """Refuses an attention layer.

    Args:
        given: what vLLM passes to a backend, by name.

    Raises:
        InputError: a quantized KV cache, attention of an encoder, or a feature that our kernels don't have.
    """
    kv_cache_dtype, attn_type = given["kv_cache_dtype"], given.get("attn_type", "decoder")
    if kv_cache_dtype not in _CACHE_DTYPES:
        raise InputError(
            f"tidaldecode has no kernels for a KV cache of {kv_cache_dtype}: start with --kv-cache-dtype auto, or "
            "bfloat16 if the checkpoint asks for another"
        )
    if attn_type != "decoder":
        raise InputError(f"tidaldecode can't work with attention of type {str(attn_type).lower()}")
    for name, feature in _FEATURES.items():
        if given.get(name) is not None:
            raise InputError(f"tidaldecode can't work with attention with {feature}")


def check_room(attention: RankAttention, left: int | None) -> None:
    """Refuses more requests than the chosen tokens have memory for.

    Args:
        attention: the plan at work.
        left: bytes that are left of what vLLM may take; `None` if it is not known.

    Raises:
        InputError: too little is left.
    """
    kept, more = attention.kept_bytes, attention.step_bytes
    if left is not None and kept + more > left:
        raise InputError(
            f"the chosen tokens of --max-num-seqs {attention.limits.requests} requests need {kept / 2**30:.1f} GiB, a "
            f"step {more / 2**30:.1f} GiB more, and {max(left, 0) / 2**30:.1f} GiB are left: lower --max-num-seqs or "
            "the token budget, take a plan with fewer sets (unified has the fewest), or raise --gpu-memory-utilization"
        )
