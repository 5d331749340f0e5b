"""A text for a model to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidaldecode.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A text, and a question about it, if there is one."""

    text: str
    question: str | None = None

    def as_turn(self) -> str:
        """The user's turn in a chat."""
        return f"{self.text.rstrip()}\n\n{self.question}" if self.question else self.text

    def as_beginning(self) -> str:
        """A text that a model without a chat template goes on with: an answer, where a question was asked."""
        return f"{self.text.rstrip()}\n\nQuestion: {self.question}\nAnswer:" if self.question else self.text

    def token_ids(self, tokenizer: Tokenizer, plain: bool = False) -> list[int]:
        """The user's turn in the model's chat template; `plain`, or without one, the beginning of a text."""
        if plain or tokenizer.chat_template is None:
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
