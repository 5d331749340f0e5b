"""Where a command's results go, checked before any work is done, and the JSON object of `--json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from tidaldecode.errors import InputError
from tidaldecode.options import Option
from tidaldecode.report.drawing import check_matplotlib
from tidaldecode.whole_file import check_writable, is_standard_output, make_results_folder

Json = Annotated[bool, Option("One JSON object on stdout, nothing else.", name="--json")]
Folder = Annotated[Path | None, Option("Folder of results.", metavar="DIR")]


def print_json(wanted: bool, content: dict[str, Any]) -> None:
    """Prints the one JSON object of a command, if `--json` wants it."""
    if wanted:
        print(json.dumps(content))


def results_file(option: str, folder: Path | None, name: str, figures: bool = True) -> Path | None:
    """The results file in a folder, which need not exist.

    Args:
        figures: whether figures are drawn beside it.

    Raises:
        InputError: the folder is a file, or there is no matplotlib.
    """
    if folder is None:
        return None
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"{option} {folder} is a file: give a folder")
    if figures:
        check_matplotlib()
    return folder / name


def figure_file(option: str, path: Path | None, name: str) -> Path | None:
    """The PNG file of an option: itself, or a file of that name in the folder, which is made.

    Raises:
        InputError: it can't be written, or there is no matplotlib.
    """
    if path is None:
        return None
    check_matplotlib()
    if path.suffix.lower() == ".png":
        check_writable(option, path)
        return path
    make_results_folder(option, path / name)
    return path / name


def output_file(option: str, path: Path, example: str, json_output: bool) -> Path:
    """The file of an option, `-` being standard output; it need not exist, but can be written.

    Args:
        example: name of such a file, for messages.
        json_output: whether `--json` wants standard output for itself.

    Raises:
        InputError: it is a folder, its own folder is missing, or it can't be written to.
    """
    file = Path("/dev/stdout") if path == Path("-") else path
    if os.path.isdir(file):
        raise InputError(f"{option} {path} is a folder: give a file, such as {path / example}")
    if json_output and is_standard_output(file):
        raise InputError(f"{option} {path} and --json both write to standard output: leave out one of them")
    check_writable(option, file)
    return file
