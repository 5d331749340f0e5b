"""Windows of a text: the first tokens of each are read, the last ones decoded, teacher-forced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tidaldecode.errors import InputError
from tidaldecode.options import Option
from tidaldecode.texts.text import Text

if TYPE_CHECKING:  # they take seconds to import, and wrong numbers are told without them
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Windows:
    """Which tokens of a text are read, and which are decoded.

    Of a window `w[0 .. context)`, the tokens `w[0 .. context - decode - 1)` are its prompt, and decode steps take
    `w[context - decode - 1 .. context - 1)`: their logits predict the last `decode` tokens.

    Raises:
        InputError: no two tokens of a window are left to be its prompt.
    """

    context: Annotated[int, Option("Tokens of a window.", min=1)] = 8192
    decode: Annotated[int, Option("Last tokens of a window, decoded.", min=1)] = 384
    windows: Annotated[int, Option("Windows.", min=1)] = 10
    offset: Annotated[int, Option("First token of the first window.", min=0)] = 0
    stride: Annotated[int, Option("Tokens from one window's start to the next's.", min=1)] = 15000

    def __post_init__(self) -> None:
        if self.context < 3:
            raise InputError(
                f"a context of {self.context} is too small: 3 tokens at least, one to read, one to decode, one to score"
            )
        if self.decode > self.context - 2:  # one token to read, one that is decoded and not scored
            raise InputError(
                f"{self.decode} decoded tokens leave no prompt in a context of {self.context}: "
                f"decode {self.context - 2} at most"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """Place of each window's first token."""
        return tuple(self.offset + window * self.stride for window in range(self.windows))

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses a context beyond the model's positions.

        Raises:
            InputError: it is.
        """
        check_context(self.context, config.max_position_embeddings)

    def check_text(self, text: Text) -> None:
        """Refuses a text that ends before the last window.

        Raises:
            InputError: it does; says how many tokens are missing.
        """
        needed, there = self.starts[-1] + self.context - len(text.prefix), len(text.tokens)
        if there < needed:
            raise InputError(
                f"the text has {there} tokens, {needed - there} too few for {self.windows} windows of {self.context} "
                f"tokens, one every {self.stride} from token {self.offset} on: lower windows, stride or context"
            )


def check_context(tokens: int, positions: int) -> None:
    """Refuses a context beyond a model's positions.

    Raises:
        InputError: it is.
    """
    if tokens > positions:
        raise InputError(f"a context of {tokens} tokens is beyond the model's {positions} positions")
