"""The attention backend on a CPU: TidalDecode's where it was chosen, vLLM's own where it was not."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ChosenBackend`, which vLLM looks up by this name when it builds the attention layers of a model."""
    if name != "ChosenBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = get_current_vllm_config_or_none()
    if config is not None and config.attention_config.backend == AttentionBackendEnum.CUSTOM:
        from tidaldecode.vllm.backend import TidalDecodeBackend

        return TidalDecodeBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
