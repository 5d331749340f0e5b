"""The command line: one file a command; parses and prints, decides nothing."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from typing import NoReturn

import typer

from tidaldecode.cli.bench import bench
from tidaldecode.cli.cache import cache
from tidaldecode.cli.calibrate import calibrate
from tidaldecode.cli.coherence import coherence
from tidaldecode.cli.eval import evaluate
from tidaldecode.cli.generate import generate
from tidaldecode.cli.report import report
from tidaldecode.cli.standard_output import StandardOutput
from tidaldecode.errors import InputError

app = typer.Typer(
    name="tidaldecode",
    help="Long-context LLM decoding that reads a few tokens of the KV cache instead of all of them.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(generate)
app.command()(coherence)
app.command()(calibrate)
app.add_typer(bench, name="bench")
app.add_typer(evaluate, name="eval")
app.command()(report)
app.command()(cache)

_STOPPED = 130  # exit status after Ctrl-C
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has no public name for it


def main() -> None:
    """Runs the command line. A bad argument or input ends in one line on stderr and exit status 2."""
    if sys.stderr is None:  # else what is meant for it goes to stdout, into the JSON object
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        _fail("standard output is closed: send it to a file or to /dev/null")
    try:
        with redirect_stdout(StandardOutput(sys.stdout)):
            status = app(standalone_mode=False)
            sys.stdout.flush()  # what failed at the end of the process would fail in a traceback
    except InputError as error:
        _fail(str(error))
    except _UsageError as error:
        _fail(getattr(error, "format_message", error.__str__)())
    except (KeyboardInterrupt, typer.Abort):
        status = _STOPPED
    if status == _STOPPED:  # newer versions of typer return it
        print("tidaldecode: stopped", file=sys.stderr)
    sys.exit(status)


def _fail(message: str) -> NoReturn:
    if message:  # empty where no command was given and the help was shown
        print("tidaldecode: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
