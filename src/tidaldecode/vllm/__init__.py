"""TidalDecode in vLLM: an attention backend, registered by a plugin; vLLM's scheduler and API stay as they are.

`vllm serve MODEL --attention-backend CUSTOM` decodes by the plan that `--additional-config` or the environment names.
"""

from __future__ import annotations

import logging
import os
from typing import Any

_log = logging.getLogger("vllm.tidaldecode")  # below vLLM's logger, for its handlers and its format


def register() -> None:
    """Registers the backend with vLLM; what its entry point `vllm.general_plugins` calls, in each of its processes.

    Every vLLM of an environment calls this, also one that wants nothing of TidalDecode: so it imports no model code,
    and an unknown vLLM is no error here, but when the backend is chosen.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from tidaldecode.serving import metrics

        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.backend.TidalDecodeBackend")
        metrics.serve()
        if os.environ.get("TIDALDECODE_PLAN"):
            _warn_unless_chosen()
        # the CPU platform knows one backend alone, whatever was chosen: what takes its place asks what was
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.on_cpu.ChosenBackend")
    except (ImportError, AttributeError) as error:
        _log.warning("tidaldecode can't register its attention backend with this vLLM: %s", error)


def _warn_unless_chosen() -> None:
    """Warns of an engine that is configured without the backend; who names a plan wants it."""
    from vllm.platforms import current_platform

    update = current_platform.check_and_update_config
    warned = False

    def check_and_update_config(vllm_config: Any) -> None:
        nonlocal warned
        chosen = vllm_config.attention_config.backend
        if getattr(chosen, "name", chosen) != "CUSTOM" and not warned:
            warned = True
            _log.warning(
                "tidaldecode: TIDALDECODE_PLAN is set, but this engine does not decode by it: "
                "start it with --attention-backend CUSTOM, or unset the variable"
            )
        update(vllm_config)

    current_platform.check_and_update_config = check_and_update_config  # each configuration is passed to it
