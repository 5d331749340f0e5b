"""Commands that are made of settings: every option is declared once, on a field of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer

from tidaldecode import InputError
from tidaldecode.cli.command import command
from tidaldecode.options import Option, budget, budgets, integers, names_of


@dataclass(frozen=True)
class Part:
    """Tokens of a text."""

    length: Annotated[int, Option("How many.", min=1)] = 8
    start: Annotated[int, Option("The first.", min=0)] = 0

    def __post_init__(self) -> None:
        if self.start > self.length:
            raise InputError(f"start {self.start} is behind the end")


@dataclass(frozen=True)
class Settings:
    """All kinds of fields."""

    what: Annotated[str, Option("What.", metavar="WHAT", positional=True)]
    sizes: Annotated[tuple[int, ...], Option("Sizes.", metavar="N,...", parse=integers)]
    part: Part = Part(length=4)
    rules: Annotated[tuple[str, ...], Option("Rules.", name="--rule", parse=names_of("one", "two"))] = ("one", "two")
    share: Annotated[int | float | None, Option("Share.", parse=budget)] = None
    kind: Annotated[Literal["auto", "other"], Option("Kind.")] = "auto"
    file: Annotated[Path | None, Option("File.", metavar="F")] = None
    loud: Annotated[bool, Option("Loud.")] = False
    kept: list[int] = field(default_factory=lambda: [7])


@pytest.fixture
def given():
    """What the function of a command got, and how it is called with arguments."""
    got = []

    def function(settings: Settings, again: Annotated[float, Option("Once more.", max=2)] = 1.5) -> None:
        """Does something."""
        got.append((settings, again))

    app = typer.Typer(add_completion=False)
    app.command()(command(function))

    def call(*arguments: str):
        app(list(arguments), standalone_mode=False)
        return got.pop()

    return call


def test_fields_get_what_is_given_and_else_their_defaults(given):
    settings, again = given("it", "--sizes", "3,1,3")
    assert settings == Settings("it", (3, 1)) and again == 1.5
    assert settings.part == Part(length=4) and settings.kept == [7]
    options = ["--length", "9", "--start", "2", "--rule", "two", "--share", "0.5", "--kind", "other", "--file", "a/b"]
    settings, again = given("it", "--sizes", "1", *options, "--loud", "--again", "2")
    assert settings == Settings("it", (1,), Part(9, 2), ("two",), 0.5, "other", Path("a/b"), True)
    assert again == 2


def test_the_defaults_of_a_function_go_before_those_of_a_dataclass():
    got = []

    def function(part: Part = Part(length=99, start=1)) -> None:
        got.append(part)

    app = typer.Typer(add_completion=False)
    app.command()(command(function))
    for arguments in ([], ["--start", "3"]):
        app(arguments, standalone_mode=False)
    assert got == [Part(99, 1), Part(99, 3)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["it"], "--sizes"),
        (["--sizes", "1"], "WHAT"),
        (["it", "--sizes", "1,x"], "--sizes '1,x': give whole numbers with commas between them"),
        (["it", "--sizes", "0"], "--sizes 0 must be positive"),
        (["it", "--sizes", "1", "--rule", "one,three"], "--rule 'three' is unknown: give some of one,two"),
        (["it", "--sizes", "1", "--share", "1.5"], "--share 1.5: a fraction of the context lies in (0, 1]"),
        (["it", "--sizes", "1", "--length", "0"], "--length"),
        (["it", "--sizes", "1", "--again", "3"], "--again"),
        (["it", "--sizes", "1", "--kind", "third"], "third"),
        (["it", "--sizes", "1", "--start", "5"], "start 5 is behind the end"),
        (["it", "--sizes", "1", "--kept", "5"], "--kept"),
        (["it", "--sizes", "1", "--no-loud"], "--no-loud"),
    ],
)
def test_mistakes_name_the_option(given, arguments, words):
    with pytest.raises((InputError, typer.BadParameter.__mro__[1])) as error:
        given(*arguments)
    assert words in getattr(error.value, "format_message", error.value.__str__)()


def test_the_help_is_the_options(given, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(IndexError):  # nothing was called
        given("--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Does something.",
        "WHAT",
        "--sizes",
        "N,...",
        "Sizes. [required]",
        "[default: one,two]",
        "Once more.",
    ):
        assert words in text


def test_budgets_are_tokens_or_shares():
    assert budgets("--budget", "64,0.1,64") == (64, 0.1)
    with pytest.raises(InputError, match="--budget 'many' is no number"):
        budgets("--budget", "64,many")
