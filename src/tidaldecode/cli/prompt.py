"""The prompt of a command: an argument, a file or standard input, with a question behind it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from tidaldecode.errors import InputError
from tidaldecode.options import Option
from tidaldecode.text_file import decode_text, read_text, without_mark
from tidaldecode.texts.prompt import Prompt


@dataclass(frozen=True)
class PromptOptions:
    """Where the text for the model to answer comes from."""

    prompt: Annotated[str | None, Option("What to answer.", metavar="PROMPT", positional=True)] = None
    prompt_file: Annotated[str | None, Option("A document; - or nothing: standard input.", metavar="F")] = None
    question: Annotated[str | None, Option("Asked after the document.", metavar="Q")] = None

    def read(self) -> Prompt:
        """The prompt.

        Raises:
            InputError: there is no text or too many, or the file is missing, empty or not UTF-8.
        """
        text, file = self.prompt, self.prompt_file
        if text is not None and file is not None:
            raise InputError("give either PROMPT or --prompt-file, not both (--question asks about the file)")
        for name, given in (("PROMPT", text), ("--question", self.question)):
            if given is not None and not _is_utf8(given):
                raise InputError(f"{name} is not UTF-8: convert it")
        if text is None:
            text = _standard_input(file) if file in (None, "-") else read_text("prompt file", file)
        text = without_mark(text)  # "$(cat FILE)" has it, too
        if not text.strip():
            raise InputError(f"the prompt{f' file {file}' if file else ''} is empty")
        return Prompt(text, None if self.question is None else without_mark(self.question))


def _is_utf8(text: str) -> bool:
    """False for what the terminal could not decode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _standard_input(asked: str | None) -> str:
    """All of standard input; `asked` is what `--prompt-file` said."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("no prompt, for standard input is closed: give PROMPT or --prompt-file FILE")
    if asked is None and sys.stdin.isatty():
        raise InputError("no prompt: give PROMPT, --prompt-file FILE, or pipe a text in")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input can't be read: {error.strerror or error}") from None
    return decode_text("standard input", data)
