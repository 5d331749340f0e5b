"""What decode steps have read, on vLLM's own `/metrics`.

The steps run in other processes than the server. Where several servers share one engine, vLLM lets Prometheus's client
add up the counters of all processes in files; else the server itself reads what the engine's process leaves in a file.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = "TIDALDECODE_COUNTERS"
"""Variable of the environment that tells the processes of an engine where their server looks for counters."""

COUNTERS = {
    "tidaldecode_decoded_tokens": "Tokens that were decoded by the plan's rules.",
    "tidaldecode_kv_tokens_read": "Tokens whose K and V decoding read, over layers with a role.",
    "tidaldecode_kv_tokens_full": "Tokens whose K and V full attention would have read for the same decoded tokens.",
}


def serve() -> None:
    """Shows the counters of the engines that this process starts; does nothing in a process that an engine started."""
    if FOLDER in os.environ:
        return
    from prometheus_client import REGISTRY

    folder = Path(tempfile.gettempdir()) / f"tidaldecode-{secrets.token_hex(8)}"  # made by who counts
    os.environ[FOLDER] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    REGISTRY.register(Counted(folder))


class Counted:
    """Collects for Prometheus what the files of a folder say; nothing as long as there is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        """The counters, added up over the processes."""
        from prometheus_client.core import CounterMetricFamily

        counted = [np.fromfile(path) for path in self._folder.glob("*")]
        if counted:
            for (name, meaning), value in zip(COUNTERS.items(), np.sum(counted, 0).tolist(), strict=True):
                yield CounterMetricFamily(name, meaning, value=value)


class Counters:
    """The counters of a process in which decode steps run."""

    def __init__(self) -> None:
        self._counters: list[Any] = []
        self._file: np.memmap[Any, Any] | None = None
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            from prometheus_client import Counter

            self._counters = [Counter(name, meaning) for name, meaning in COUNTERS.items()]
        elif os.environ.get(FOLDER):
            folder = Path(os.environ[FOLDER])
            folder.mkdir(mode=0o700, exist_ok=True)
            path = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
            self._file = np.memmap(path, np.float64, "w+", shape=len(COUNTERS))

    def add(self, values: NDArray[np.float64]) -> None:
        """Adds to each counter."""
        if self._file is not None:
            self._file += values
        for counter, value in zip(self._counters, values.tolist(), strict=False):
            counter.inc(value)
