"""`tidaldecode bench generate`: whole calls of `generate`, prefill included, by each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidaldecode.bench.settings import WholeRunSettings
from tidaldecode.cli.command import command
from tidaldecode.cli.study import StudyOptions
from tidaldecode.cli.tables import print_table
from tidaldecode.options import Seed
from tidaldecode.report.labels import budget_label, ratio
from tidaldecode.texts.text import TextSource

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import OnProgress, Study
    from tidaldecode.models import ChosenModel
    from tidaldecode.results.whole_runs import WholeRunRow

_COLUMNS = ("method", "prefill s", "all s", "speed-up", "tokens/s", "speed-up", "KV read")


@command
def generate(settings: WholeRunSettings, text: TextSource, options: StudyOptions, seed: Seed = 0) -> None:
    """Times whole calls of generate behind a text's windows: prefill, decoding, memory, beside Transformers' own."""
    text.parts()

    def make(chosen: ChosenModel, on_progress: OnProgress) -> Study:
        from tidaldecode.bench.whole_run import whole_runs_of

        return whole_runs_of(text, settings, chosen, on_progress)

    report = options.run("generate.jsonl", make, seed, settings.plans, max(settings.contexts), figures=False)
    from tidaldecode.hf.rounds import Pace  # with PyTorch, which is there by now

    about = "{model}, {dtype}, {device}".format(**report.about)
    for context, batch in dict.fromkeys((row.context, row.batch) for row in report.rows):
        title = f"{about}: batch {batch}, {context:,} tokens, {settings.new_tokens:,} new"
        rows = [row for row in report.rows if (row.context, row.batch) == (context, batch)]
        memory = ("GiB",) if any(row.peak_memory_gib is not None for row in rows) else ()
        columns = (*_COLUMNS, *memory)
        print_table(options.console, title, columns, (_cells(row)[: len(columns)] for row in rows), no_wrap=True)
    for row in report.rows:
        if row.pace is not None:
            pace = Pace(**{name: value for name, value in row.pace.items() if name != "speedup"})
            line = f"batch {row.batch}, {row.context:,} tokens: {pace}"
            options.console.print(line, highlight=False, soft_wrap=True, markup=False)
    options.show(report)


def _cells(row: WholeRunRow) -> tuple[str, ...]:
    name = " ".join(filter(None, (row.variant.label, budget_label(row.budget))))
    name += "" if row.lossless is None else f", T = {row.lossless}"
    if row.out_of_memory or row.prefill_ms is None or row.total_ms is None:
        return name, "no memory", *[""] * (len(_COLUMNS) - 1)
    return (
        name,
        f"{row.prefill_ms / 1000:,.2f}",
        f"{row.total_ms / 1000:,.2f}",
        ratio(row.speedup_vs_full),
        f"{row.tokens_per_second:,.1f}",
        ratio(row.decode_speedup_vs_full),
        f"{row.kv_read_fraction:.1%}",
        "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:,.1f}",
    )
