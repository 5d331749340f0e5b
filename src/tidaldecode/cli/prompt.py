"""The prompt of a command: an argument, a file or standard input, with a question behind it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidaldecode.errors import InputError
from tidaldecode.text_file import decode_text, read_text, without_mark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


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

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The user's turn in the model's chat template, or the beginning of a text for a model without one."""
        if tokenizer.chat_template is None:
            return tokenizer(self.as_beginning(), verbose=False)["input_ids"]
        turns = [{"role": "user", "content": self.as_turn()}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def most_tokens(self) -> int:
        """More tokens than any tokenizer makes of it, a chat template aside: one for each byte."""
        return len(self.as_beginning().encode())


def check_length(tokens: int, new_tokens: int, positions: int) -> None:
    """Refuses a prompt that leaves no positions of the model for the new tokens.

    Raises:
        InputError: it does; says by how many tokens it is too long.
    """
    if tokens + new_tokens > positions:
        raise InputError(
            f"the prompt has {tokens} tokens, with {new_tokens} new ones {tokens + new_tokens}; the model has "
            f"{positions} positions: shorten the prompt by {tokens + new_tokens - positions} tokens"
        )


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
