"""What is chosen when coherence is measured, and at which decode steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tidaldecode.errors import InputError
from tidaldecode.models.architecture import check_architecture
from tidaldecode.options import Option, Seed, budget, names_of
from tidaldecode.plan import Selection, tokens_of
from tidaldecode.texts.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_RULES: tuple[Selection, ...] = ("unified", "per_group", "per_head")
_WINDOWS = Windows(context=4096, decode=64, windows=4)


@dataclass(frozen=True)
class CoherenceSettings:
    """What is chosen, and at which decode steps of a text.

    Attributes:
        windows: the decode steps; the prompts before them are read with full attention.
        budget: of a choice, sinks and the new token included.

    Raises:
        InputError: the budget leaves nothing to choose.
    """

    windows: Windows = _WINDOWS
    selections: Annotated[
        tuple[Selection, ...],
        Option(
            "Whose scores choose: of unified, per_group, per_head.",
            name="--selection",
            metavar="S,...",
            parse=names_of(*_RULES),
        ),
    ] = _RULES
    budget: Annotated[
        int | float, Option("Tokens that a layer chooses, or a fraction of the context.", metavar="K", parse=budget)
    ] = 256
    sink_tokens: Annotated[int, Option("First tokens that every choice holds.", metavar="N", min=0)] = 0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.tokens < self.sink_tokens + 2:
            raise InputError(
                f"budget {self.tokens} leaves nothing to choose: {self.sink_tokens} sinks, the new token and a chosen "
                f"one make {self.sink_tokens + 2}"
            )
        shortest = self.windows.context - self.windows.decode
        if self.tokens >= shortest:
            raise InputError(
                f"budget {self.tokens} leaves nothing to choose: the first decode step of a window has a context of "
                f"{shortest} tokens"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a choice."""
        return tokens_of(self.budget, self.windows.context)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses a model that can't be measured.

        Raises:
            InputError: its architecture is not supported, or the context is beyond its positions.
        """
        check_architecture(config)
        self.windows.check(config)
