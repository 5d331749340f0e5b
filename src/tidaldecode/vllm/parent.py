"""The backend of vLLM's that ours extends, and how its KV cache lies: what differs between platforms and versions."""

from __future__ import annotations

from typing import Any

import vllm
from torch import Tensor
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


def cache_views(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a layer's cache as our operations see them: [num_blocks, block_size, Hkv, D] each, without a copy.

    Args:
        kv_cache: [num_blocks, Hkv, block_size, 2 · D]; on a GPU a token's K and then its V, on a CPU a block's K,
            [D, block_size], and then its V, [block_size, D].
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    if kv_cache.device.type != "cpu":
        rows = kv_cache.transpose(1, 2)
        return rows[..., : width // 2], rows[..., width // 2 :]
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * width // 2)
    k_cache = halves[:, :, 0].view(num_blocks, num_kv_heads, width // 2, block_size)
    v_cache = halves[:, :, 1].view(num_blocks, num_kv_heads, block_size, width // 2)
    return k_cache.permute(0, 3, 1, 2), v_cache.transpose(1, 2)
