"""TidalDecode in vLLM: an attention backend, registered by a plugin; vLLM's scheduler and API stay as they are.

`vllm serve MODEL --attention-backend CUSTOM` decodes by the plan that `--additional-config` or the environment names.
"""

from __future__ import annotations

import logging

_log = logging.getLogger("vllm.tidaldecode")  # below vLLM's logger, for its handlers and its format


def register() -> None:
    """Registers the backend with vLLM; what its entry point `vllm.general_plugins` calls, in each of its processes.

    Every vLLM of an environment calls this, also one that wants nothing of TidalDecode: so it imports no model code,
    and an unknown vLLM is no error here, but when the backend is chosen.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.backend.TidalDecodeBackend")
        # the CPU platform knows one backend alone, whatever was chosen: what takes its place asks what was
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.on_cpu.ChosenBackend")
    except (ImportError, AttributeError) as error:
        _log.warning("tidaldecode can't register its attention backend with this vLLM: %s", error)
