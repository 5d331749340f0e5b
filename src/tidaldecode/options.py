"""What a setting is on a command line: plain data on the field of a dataclass, and how texts become values.

    @dataclass(frozen=True)
    class Windows:
        context: Annotated[int, Option("Tokens of a window.", min=1)] = 8192
        lengths: Annotated[tuple[int, ...], Option("Of prompts.", metavar="N,...", parse=integers)] = (4000,)

`tidaldecode.cli.command` makes commands of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from tidaldecode.errors import InputError

Parse = Callable[[str, str], Any]
"""From the name of an option and what was given to its value; raises `InputError`, whose line names the option."""


@dataclass(frozen=True)
class Option:
    """An option of a command, or, if `positional`, an argument.

    Attributes:
        help: one sentence.
        name: `--` and the field's name if left out.
        metavar: what stands for the value in the help.
        min, max: limits of a number.
        parse: makes the value of a text, where the field's type alone can't.
    """

    help: str
    name: str | None = None
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    parse: Parse | None = None
    positional: bool = False


PlanName = Annotated[str, Option("A plan file, 'auto', 'paper', or the name of a shipped plan.", metavar="NAME|FILE")]
TrustRemoteCode = Annotated[bool, Option("Run code that comes with the model.")]
Seed = Annotated[int, Option("Seed of everything random.", min=0, max=2**63 - 1)]


def budget(option: str, text: str) -> int | float:
    """A budget in tokens (`256`), or as a fraction of the context (`0.1`).

    Raises:
        InputError: it is no number, or not positive.
    """
    try:
        value = float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is no number: give tokens (256) or a fraction (0.1)") from None
    if not value > 0:
        raise InputError(f"{option} {text} must be positive")
    if isinstance(value, float) and value > 1:
        raise InputError(f"{option} {text}: a fraction of the context lies in (0, 1]; give tokens as a whole number")
    return value


def budgets(option: str, text: str) -> tuple[int | float, ...]:
    """Budgets with commas between them, as `budget` takes one.

    Raises:
        InputError: one of them is no number, or not positive.
    """
    return tuple(dict.fromkeys(budget(option, item) for item in text.split(",")))


def integers(option: str, text: str) -> tuple[int, ...]:
    """Positive whole numbers with commas between them.

    Raises:
        InputError: one of them is no such number.
    """
    try:
        numbers = [int(item) for item in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: give whole numbers with commas between them (1024,4096)") from None
    if min(numbers) < 1:
        raise InputError(f"{option} {min(numbers)} must be positive")
    return tuple(dict.fromkeys(numbers))


def names(option: str, text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(dict.fromkeys(item.strip() for item in text.split(",")))


def names_of(*known: str) -> Parse:
    """The `parse` of an option that takes some of the known names, with commas between them."""

    def parse(option: str, text: str) -> tuple[str, ...]:
        for name in names(option, text):
            if name not in known:
                raise InputError(f"{option} {name!r} is unknown: give some of {','.join(known)}")
        return names(option, text)

    return parse
