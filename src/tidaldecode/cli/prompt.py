"""The prompt of a command: an argument, a file or standard input, with a question behind it."""

from __future__ import annotations

import sys
from pathlib import Path

from tidaldecode.errors import InputError


def read_prompt(prompt: str | None, prompt_file: str | None, question: str | None) -> str:
    """The text for the model to answer.

    Args:
        prompt: the text itself.
        prompt_file: a file that holds it, `-` for standard input.
        question: asked about it, at its end.

    Raises:
        InputError: there is no text or too many, or the file is missing, empty or not UTF-8.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("give either PROMPT or --prompt-file, not both (--question asks about the file)")
    for name, text in (("PROMPT", prompt), ("--question", question)):
        if text is not None and not _is_utf8(text):
            raise InputError(f"{name} is not UTF-8: convert it")
    if prompt is None:
        prompt = _read(prompt_file)
    if not prompt.strip():
        raise InputError(f"the prompt{f' file {prompt_file}' if prompt_file else ''} is empty")
    return f"{prompt.rstrip()}\n\n{question}" if question else prompt


def _is_utf8(text: str) -> bool:
    """False for what the terminal could not decode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(prompt_file: str | None) -> str:
    if prompt_file is None and sys.stdin.isatty():
        raise InputError("no prompt: give PROMPT, --prompt-file FILE, or pipe a text in")
    try:
        data = sys.stdin.buffer.read() if prompt_file in (None, "-") else Path(str(prompt_file)).read_bytes()
    except FileNotFoundError:
        raise InputError(f"prompt file {prompt_file} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"prompt file {prompt_file!r} can't be read: {getattr(error, 'strerror', error)}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt{f' file {prompt_file}' if prompt_file else ''} is not UTF-8 (byte {error.start}): convert it"
        ) from None
