"""vLLM on a CPU, in this process, with tiny random models and the demo model."""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that a test can look at the engine's inside
os.environ["VLLM_CPU_CI_ENV"] = "1"  # nothing is compiled
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import save_tiny_llama, stop
from vllm import LLM


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer) -> Path:
    """A tiny Llama with four query heads and two KV heads, for contexts of 8,192 tokens."""
    folder = tmp_path_factory.mktemp("tiny-llama-long")
    byte_tokenizer.save_pretrained(folder)
    return save_tiny_llama(folder)


@pytest.fixture
def start() -> Iterator[Callable[..., LLM]]:
    """Starts an engine in this process, float32, and stops it after the test."""
    with contextlib.ExitStack() as stack:

        def make(model: Path | str, **options: Any) -> LLM:
            fixed = {"dtype": "float32", "enforce_eager": True, "max_model_len": 8192, "kv_cache_memory_bytes": 2**29}
            engine = LLM(model=str(model), **(fixed | options))
            stack.callback(stop, engine)
            return engine

        yield make


@pytest.fixture(autouse=True)
def _without_llvmlite() -> Iterator[None]:
    """Forgets llvmlite after each test: vLLM looks into every loaded module when it starts, and trips over this one."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite")]:
        del sys.modules[name]
