"""From a model's name to the model: the demo model, a local folder, a GGUF file, or a hub id."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tidaldecode.errors import InputError
from tidaldecode.models import demo
from tidaldecode.models.files import ModelFiles


def _to_stderr(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def find_model(name: str, *, trust_remote_code: bool = False, report: Callable[[str], None] = _to_stderr) -> ModelFiles:
    """The files of a model.

    Args:
        name: `smollm2-135m` (the demo model), a local folder, a GGUF file (see `converted_gguf`), a folder that holds
            one, or a hub id.
        trust_remote_code: let Transformers run code that comes with the model.
        report: told, in words, what takes long.

    Raises:
        InputError: there is no such file, the demo model can't be fetched, or a GGUF file can't be converted.
    """
    location, path = name, None
    if name == demo.NAME:
        location = str(demo.demo_model_folder(report))
    elif (path := gguf_of(name)) is not None:
        from tidaldecode.models.gguf import converted_gguf

        location = str(converted_gguf(path, report))
    return ModelFiles(name, location, path, trust_remote_code)


def gguf_of(name: str) -> Path | None:
    """The GGUF file of a model's name, itself or the only one in its folder; `None` of another model.

    Raises:
        InputError: the name can only be that of a file or folder that is not there, or that holds no model.
    """
    path = Path(name)
    if path.is_file() or path.suffix.lower() == ".gguf":
        return _checked_gguf(path)
    if path.is_dir():
        return None if (path / "config.json").is_file() else _only_gguf(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model folder {name} does not exist")
    return None


def _checked_gguf(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"model file {path} does not exist")
    if path.suffix.lower() != ".gguf":
        raise InputError(f"model file {path} is no GGUF file: of safetensors give the folder that they lie in")
    return path


def _only_gguf(folder: Path) -> Path:
    """The GGUF file of a folder that is not in Transformers' format."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    if not files:
        raise InputError(
            f"model folder {folder} holds no config.json and no GGUF file: it is not in Transformers' format"
        )
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise InputError(f"model folder {folder} holds {len(files)} GGUF files ({names}): give one of them as --model")
    return files[0]
