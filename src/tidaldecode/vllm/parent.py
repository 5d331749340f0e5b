"""The backend of vLLM's that ours extends: what differs between platforms and versions."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.platforms import current_platform

from tidaldecode import __version__
from tidaldecode.errors import InputError

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


def parent_backend() -> type[Any]:
    """VLLM's own backend of this platform: what prefill, and layers that read everything, go through.

    Raises:
        InputError: neither a CPU nor an NVIDIA GPU.
    """
    check_version()
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    if not current_platform.is_cuda():
        raise InputError(
            f"tidaldecode's vLLM backend runs on CPUs and NVIDIA GPUs, not on {current_platform.device_name}"
        )
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if get_flash_attn_version() is not None:
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

        return FlashAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    return TritonAttentionBackend
