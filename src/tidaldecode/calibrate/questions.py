"""Questions that a calibration asks about its texts: what a model answers to them is what a plan must not spoil."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tidaldecode.calibrate.settings import CalibrationSettings
from tidaldecode.errors import InputError
from tidaldecode.texts.questions import Question, ask
from tidaldecode.texts.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

QUESTIONS = (
    "Write a summary of this text in one paragraph.",
    "What are the most important things that happen or are said in this text, in the order in which they come?",
    "Who or what is this text about? Give a list of names, each with one sentence.",
    "Write a short summary of this text for somebody who has never read it.",
)
"""Half of them ask for summaries, which depend on all of a text."""


def prompts(
    tokenizer: Tokenizer, text: Text, starts: Sequence[int], context: int, number: int
) -> Iterator[tuple[int, ...]]:
    """Token ids of questions about windows of a text, in the model's chat template if it has one.

    Args:
        starts: of the windows, which serve in turn.
        context: the most tokens of a prompt.
        number: of questions.
    """
    plain = tokenizer.chat_template is None
    for place in range(number):
        start = starts[place % len(starts)]
        document = tokenizer.decode(text.tokens[start : start + context], skip_special_tokens=True)
        question = Question(str(place), document, QUESTIONS[(place + place // len(starts)) % len(QUESTIONS)])
        (asked,) = ask(tokenizer, [question], context, plain)
        yield asked.token_ids


def check_questions(tokenizer: Tokenizer, text: Text, heldout: Text, settings: CalibrationSettings) -> None:
    """Makes the prompts of both texts, before a model is loaded.

    Raises:
        InputError: they can't be made.
    """
    context = settings.context - settings.decode
    try:
        for asked, starts in ((text, settings.starts(text)), (heldout, settings.heldout(heldout).starts)):
            if settings.answers > (most := len(QUESTIONS) * len(starts)):
                raise InputError(f"--answers {settings.answers}: of {len(starts)} windows {most} are asked at most")
            list(prompts(tokenizer, asked, starts, context, settings.answers))
    except InputError as error:
        raise InputError(f"{error}; or ask none, --answers 0") from None
