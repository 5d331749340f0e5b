"""A text that somebody else wrote, as UTF-8: the one place where files and standard input become text."""

from __future__ import annotations

import os
from pathlib import Path

from tidaldecode.errors import InputError

_MARK = "\ufeff"  # a byte order mark, which Windows' editors put in front, and which is no part of the text


def read_text(what: str, path: str | os.PathLike[str]) -> str:
    """The text of a file, its line ends as they are, without a byte order mark.

    Args:
        what: names the kind of file in messages: `plan file`, ...

    Raises:
        InputError: it is missing, can't be read, or is not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{what} {str(path)!r} can't be read: {reason}") from None
    return decode_text(f"{what} {path}", data)


def decode_text(what: str, data: bytes) -> str:
    """The text in bytes, without a byte order mark.

    Args:
        what: names what holds it in messages.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return without_mark(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 (byte {error.start}): convert it") from None


def without_mark(text: str) -> str:
    """A text without a byte order mark in front of it."""
    return text.removeprefix(_MARK)
