"""`tidaldecode eval correction`: cache correction and lossless decoding over the tokens between two full passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from tidaldecode.cli.command import command
from tidaldecode.cli.study import STUDY, StudyOptions
from tidaldecode.cli.tables import print_table
from tidaldecode.options import Option, PlanName, Seed, budgets, integers
from tidaldecode.report.labels import budget_label, share_label
from tidaldecode.report.losses import correction_panels
from tidaldecode.texts.text import TextSource
from tidaldecode.texts.windows import Windows

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import OnProgress, Study
    from tidaldecode.models import ChosenModel
    from tidaldecode.results.correction import CorrectionRow

_WINDOWS = Windows(decode=256, windows=4)
_COLUMNS = ("", "budget", "T", "above\nfull,\nnats", "ms per\ntoken", "speed-up", "tokens\nper\nround", "KV read")

Lengths = Annotated[
    tuple[int, ...], Option("Tokens between two passes with full attention.", metavar="T,...", parse=integers)
]
Budgets = Annotated[
    tuple[int | float, ...],
    Option("Tokens a sparse layer reads, or fractions of the context.", metavar="K,...", parse=budgets),
]


@command
def correction(
    text: TextSource,
    windows: Windows = _WINDOWS,
    lengths: Lengths = (4, 8, 16, 32, 64),
    budget: Budgets = (128, 256, 512),
    plan: PlanName = "auto",
    options: StudyOptions = STUDY,
    seed: Seed = 0,
) -> None:
    """Measures what correcting the cache every T tokens, and verifying every T tokens, give and take."""
    text.parts()

    def make(chosen: ChosenModel, on_progress: OnProgress) -> Study:
        from tidaldecode.evaluate.correction import correction_of

        return correction_of(text, windows, plan, budget, lengths, chosen, on_progress)

    report = options.run("correction.jsonl", make, seed, [plan], windows.context)
    title = f"{report.about['model']}, {text.title}"
    name = next((row.plan for row in report.rows if row.plan is not None), None)
    figures = options.draw(report, f"{title}, plan {name}", correction=correction_panels)
    scored = f"{windows.windows} windows, the last {windows.decode:,} of {windows.context:,} tokens"
    print_table(options.console, f"{title}: {scored}", _COLUMNS, map(_cells, report.rows))
    options.show(report, figure=figures[0] if figures else None)


def _cells(row: CorrectionRow) -> tuple[str, ...]:
    accepted = "" if row.accepted_per_round is None else f"{row.accepted_per_round:.2f}"
    length = "" if row.length is None else str(row.length)
    times = f"{row.ms_per_token:.1f}", f"{row.speedup:.2f}"
    share = share_label(row.kv_read_fraction)
    return row.mode, budget_label(row.budget), length, f"{row.gap:+.4f}", *times, accepted, share
