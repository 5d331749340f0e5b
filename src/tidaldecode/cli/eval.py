"""`tidaldecode eval`: what a method costs in quality, one command a file."""

from __future__ import annotations

import typer

from tidaldecode.cli.eval_ppl import ppl

evaluate = typer.Typer(
    help="Compares methods with full attention in quality, on the same prefills.", no_args_is_help=True
)
evaluate.command()(ppl)


@evaluate.callback()
def _evaluate() -> None:
    """Keeps `ppl` a command of its own as long as it is the only one."""
