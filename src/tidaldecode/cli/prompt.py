"""The prompt of a command: an argument, a file or standard input, with a question behind it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tidaldecode.errors import InputError
from tidaldecode.text_file import decode_text, read_text, without_mark


@dataclass(frozen=True)
class Prompt:
    """A text for the model to answer, and a question about it, if there is one."""

    text: str
    question: str | None = None

    def as_turn(self) -> str:
        """The user's turn in a chat."""
        return f"{self.text.rstrip()}\n\n{self.question}" if self.question else self.text

    def as_beginning(self) -> str:
        """A text that a model without a chat template goes on with: an answer, where a question was asked."""
        return f"{self.text.rstrip()}\n\nQuestion: {self.question}\nAnswer:" if self.question else self.text


def read_prompt(prompt: str | None, prompt_file: str | None, question: str | None) -> Prompt:
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
        prompt = (
            read_text("prompt file", prompt_file) if prompt_file not in (None, "-") else _standard_input(prompt_file)
        )
    prompt = without_mark(prompt)  # "$(cat FILE)" has it, too
    if not prompt.strip():
        raise InputError(f"the prompt{f' file {prompt_file}' if prompt_file else ''} is empty")
    return Prompt(prompt, None if question is None else without_mark(question))


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
