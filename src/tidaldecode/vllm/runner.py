"""vLLM's model runner, which alone knows how long the prompts of a batch's requests are."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import numpy as np

from tidaldecode.serving.batch import Integers


class PromptLengths:
    """How long the prompts of a batch's requests are, without waiting for the device.

    vLLM's metadata says whether a request is still being read, and for a request that is taken up again after a
    preemption that counts what it had generated, too. The runner keeps the lengths of the prompts themselves on the
    host. It has no name for a builder to find it by, but it is what makes the builders.

    Raises:
        RuntimeError: it is made by something else than a model runner.
    """

    def __init__(self) -> None:
        self._runner = weakref.ref(_calling_runner())

    @property
    def runner(self) -> Any:
        """The runner; `None` when it is gone."""
        return self._runner()

    def of(self, common: Any) -> Integers | None:
        """[requests]; `None` in a trial run, which has none.

        Args:
            common: what vLLM knows of the batch (`CommonAttentionMetadata`).
        """
        runner = self.runner
        if runner is None:
            return None
        if hasattr(runner, "req_states"):  # model runner V2
            states, rows = runner.req_states, common.req_idx
            if rows is None or states.num_reqs == 0:
                return None
            return states.prompt_len.np[rows].astype(np.int64)
        batch = runner.input_batch
        return None if batch.num_reqs == 0 else batch.num_prompt_tokens[: common.num_reqs].astype(np.int64)


def _calling_runner() -> Any:
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if hasattr(caller, "req_states") or hasattr(caller, "input_batch"):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("a builder of TidalDecode's metadata is made by vLLM's model runner alone")
