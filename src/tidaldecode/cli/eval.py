"""`tidaldecode eval`: what a method costs in quality, one command a file."""

from __future__ import annotations

import typer

from tidaldecode.cli.eval_answers import answers
from tidaldecode.cli.eval_correction import correction
from tidaldecode.cli.eval_lm_eval import lm_eval
from tidaldecode.cli.eval_needle import needle
from tidaldecode.cli.eval_ppl import ppl

evaluate = typer.Typer(
    help="Compares methods with full attention in quality, on the same prefills.", no_args_is_help=True
)
evaluate.command()(ppl)
evaluate.command()(needle)
evaluate.command()(answers)
evaluate.command()(correction)
evaluate.command("lm-eval")(lm_eval)
