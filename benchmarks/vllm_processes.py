"""Engines of vLLM's are measured in a process each, which tells its rows to the one that writes the result file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_MARK = "ROW "  # what else is printed is vLLM's, and goes to stderr

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is here, to see what each step ran
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def tell(**row: Any) -> None:
    """Hands a row to the process that started this one."""
    print(_MARK + json.dumps(row), flush=True)


def rows_of(engine: str, *arguments: str, variables: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """What this script tells in a process of its own.

    Args:
        engine: that it measures; its option `--engine`.
        arguments: of the command line, after this process's own.
        variables: of the environment, beside this process's.
    """
    command = [sys.executable, *sys.argv, "--engine", engine, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | dict(variables or {})
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(_MARK):
                sys.stderr.write(line)
                continue
            text = line.removeprefix(_MARK).strip()
            print(text[:400], flush=True)
            yield json.loads(text)
    if process.returncode:
        print(f"the engine {engine} ended with status {process.returncode}", file=sys.stderr)
