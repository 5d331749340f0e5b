"""Needles in a haystack: one sentence in a long text, asked for at its end (the TidalDecode paper's task)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tidaldecode.errors import InputError
from tidaldecode.options import Option, Seed, integers
from tidaldecode.texts.text import Text

if TYPE_CHECKING:  # they take seconds to import, and wrong settings are told without them
    from torch import Tensor
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

_CITIES = (
    "Amsterdam Athens Berlin Bogota Cairo Dublin Geneva Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon "
    "Madrid Manila Nairobi Oslo Prague Quito Rome Seoul Sydney Tokyo Vienna Warsaw Zurich"
).split()


@dataclass(frozen=True)
class NeedleSettings:
    """Which needles are hidden; the seed is that of the cities, the numbers and the stretches of the haystack."""

    lengths: Annotated[tuple[int, ...], Option("Tokens of the prompts.", metavar="N,...", parse=integers)] = (4000,)
    depths: Annotated[int, Option("Depths, evenly spaced from start to end.", min=1)] = 10
    repeats: Annotated[int, Option("Needles for each length and depth.", min=1)] = 1
    seed: Seed = 0


@dataclass(frozen=True)
class NeedleCase:
    """A prompt that ends where the number of its needle is to follow.

    Attributes:
        length: tokens of the prompt.
        depth: where the needle lies, 0 (start) to 1 (end).
        repeat: number of the case among those of its length and depth.
        start: the first token of the haystack that is used.
        needle, question, answer: token ids; the answer is how its digits continue the question's tokens.
    """

    length: int
    depth: float
    repeat: int
    start: int
    needle: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    def prompt(self, haystack: Text) -> Tensor:
        """Haystack, needle, haystack, question: [1, length], int64."""
        import torch

        rest = self.length - len(self.needle) - len(self.question)
        hay = haystack.window(self.start, rest)[0]
        before = max(len(haystack.prefix), round(self.depth * rest))
        ids = [hay[:before], torch.tensor(self.needle), hay[before:], torch.tensor(self.question)]
        return torch.cat(ids)[None]


def needle_cases(
    tokenizer: Tokenizer, haystack: Text, settings: NeedleSettings, config: PreTrainedConfig
) -> tuple[NeedleCase, ...]:
    """Cases of every length, depth and repeat, each with its own city, number and stretch of the haystack.

    A case depends on the seed and on its length, depth and repeat alone: more repeats keep the cases that were there.

    Args:
        tokenizer: the one that the haystack was tokenized with.
        haystack: the text that hides the needles.
        config: the model's.

    Raises:
        InputError: a length is beyond the model's positions or leaves no haystack, or the haystack has too few tokens.
    """
    cases = tuple(
        _case(tokenizer, haystack, length, round(index / max(1, settings.depths - 1), 4), repeat, settings.seed)
        for length in settings.lengths
        for index in range(settings.depths)
        for repeat in range(settings.repeats)
    )
    for case in cases:
        positions = config.max_position_embeddings
        if case.length + len(case.answer) > positions:
            raise InputError(
                f"prompts of {case.length} tokens and answers of {len(case.answer)} are beyond the model's {positions} "
                f"positions: lengths of {positions - len(case.answer)} at most"
            )
    return cases


def _case(tokenizer: Tokenizer, haystack: Text, length: int, depth: float, repeat: int, seed: int) -> NeedleCase:
    generator = random.Random(f"{seed} {length} {depth} {repeat}")
    city, digits = generator.choice(_CITIES), str(generator.randint(1_000_000, 9_999_999))
    needle = _tokens(tokenizer, f" The special magic {city} number is: {digits}.")
    asked = f"\n\nThe special magic {city} number is:"
    question = _tokens(tokenizer, asked)
    asked_and_answered = _tokens(tokenizer, f"{asked} {digits}")
    joined = asked_and_answered[: len(question)] == question  # else the tokenizer merges the answer with the colon
    answer = asked_and_answered[len(question) :] if joined else _tokens(tokenizer, f" {digits}")
    hay = length - len(haystack.prefix) - len(needle) - len(question)
    if hay < 1:
        raise InputError(
            f"prompts of {length} tokens have no room for a haystack: needle and question are {length - hay} tokens"
        )
    there = len(haystack.tokens)
    if there < hay:
        raise InputError(f"the haystack has {there} tokens, {hay - there} too few for prompts of {length}")
    return NeedleCase(length, depth, repeat, generator.randrange(there - hay + 1), needle, question, answer)


def _tokens(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
