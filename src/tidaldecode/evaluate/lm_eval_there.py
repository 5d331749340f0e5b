"""Whether lm-eval is there, and the task files that it is to read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tidaldecode.errors import InputError


def check_lm_eval(folder: Path | None) -> None:
    """Refuses to go on without lm-eval, or without the folder of task files.

    Args:
        folder: of the user's own task files, if there are any.

    Raises:
        InputError: lm-eval is not installed, or there is no such folder.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-eval is not installed: pip install 'tidaldecode[eval]'")
    if folder is not None and not folder.is_dir():
        raise InputError(f"--include-path {folder} is no folder: give one with task files (YAML)")
