"""The backend of vLLM's that ours extends: what differs between platforms and versions."""

from __future__ import annotations

import logging
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform

from tidaldecode import __version__
from tidaldecode.errors import InputError
from tidaldecode.serving.settings import Settings

_log = logging.getLogger("vllm.tidaldecode")

TESTED_VERSIONS = ("0.32", "0.33")
"""Of vLLM; 0.33 was read and not run: there is no CPU build of it."""


def check_version() -> None:
    """Refuses a vLLM that was not tested: what a backend must do is no public interface of it.

    Raises:
        InputError: another version.
    """
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED_VERSIONS:
        wanted = " or ".join(TESTED_VERSIONS)
        raise InputError(
            f"tidaldecode {__version__} works with vLLM {wanted}, and this is {vllm.__version__}: "
            f'pip install "vllm=={TESTED_VERSIONS[0]}.*"'
        )


def own_backend() -> type[Any]:
    """VLLM's own backend of this platform: what prefill, and layers that read everything, go through.

    Raises:
        InputError: neither a CPU nor an NVIDIA GPU, or FlashAttention was asked for and is not there.
    """
    check_version()
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    if not current_platform.is_cuda():
        raise InputError(
            f"tidaldecode's vLLM backend runs on CPUs and NVIDIA GPUs, not on {current_platform.device_name}"
        )
    if _takes_flash_attention():
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

        return FlashAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    return TritonAttentionBackend


def _takes_flash_attention() -> bool:
    """Whether FlashAttention is asked for, or is there and knows the model's dtype."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    asked = Settings.of(None if config is None else config.additional_config).vllm_attention
    if asked == "TRITON_ATTN":
        return False
    missing = _no_flash_attention()
    if missing is not None:
        if asked is not None:
            raise InputError(
                f"{missing}: leave vllm_attention out, and vLLM's Triton attention takes its place, or install a build "
                "of vLLM with FlashAttention for this GPU"
            )
        _log.warning("tidaldecode: %s: its Triton attention reads prompts, and what a plan reads in full", missing)
        return False
    return asked is not None or config is None or config.model_config.dtype in (torch.float16, torch.bfloat16)


def _no_flash_attention() -> str | None:
    """What this build of vLLM lacks, in words; `None` if it has FlashAttention for the GPU."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        found = get_flash_attn_version() is not None
    except (ImportError, OSError) as error:
        return f"this vLLM's FlashAttention can't be loaded ({str(error).splitlines()[0]})"
    return None if found else f"this vLLM has no FlashAttention for {current_platform.get_device_name()}"
