"""Standard output that can fail: a full disk, or a reader that has gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

from tidaldecode.errors import InputError

Result = TypeVar("Result")


class StandardOutput:
    """Takes the place of `sys.stdout`, so that its failures are told apart from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's own.

        Raises:
            InputError: it can't be written to.
        """
        return self._checked(self._stream.write, text)

    def flush(self) -> None:
        """As a stream's own.

        Raises:
            InputError: it can't be written to.
        """
        self._checked(self._stream.flush)

    def _checked(self, call: Callable[..., Result], *arguments: str) -> Result:
        try:
            return call(*arguments)
        except OSError as error:
            # what it still holds is given up, or Python would try again at the end, and say so in a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):  # its reader has what it wanted
                sys.exit(1)
            raise InputError(f"standard output can't be written: {error.strerror}") from None
