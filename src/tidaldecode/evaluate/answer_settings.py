"""How questions about documents are asked and answered. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tidaldecode.errors import InputError
from tidaldecode.evaluate.generation_settings import Sampling
from tidaldecode.options import Option
from tidaldecode.texts.windows import check_context


@dataclass(frozen=True)
class AnswerSettings:
    """How long prompts and answers are, and how the next token is taken."""

    context: Annotated[int, Option("Tokens of a prompt at most; longer documents are cut.", min=2)] = 4096
    max_new_tokens: Annotated[int, Option("Most tokens of an answer.", min=1)] = 256
    plain_prompt: Annotated[bool, Option("'Question: ... Answer:' instead of the chat template.")] = False
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer."""
        return self.context + self.max_new_tokens

    def check(self, positions: int) -> None:
        """Refuses prompts and answers beyond a model's positions.

        Raises:
            InputError: they are.
        """
        check_context(self.context, positions)
        if self.longest > positions:
            raise InputError(
                f"a context of {self.context} tokens and answers of {self.max_new_tokens} are beyond the model's "
                f"{positions} positions: --context {positions - self.max_new_tokens} at most"
                if self.max_new_tokens < positions - 1
                else f"answers of {self.max_new_tokens} tokens are beyond the model's {positions} positions: lower "
                "--max-new-tokens"
            )
