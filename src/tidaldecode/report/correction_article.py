"""Article on cache correction and lossless decoding over the tokens between two passes with full attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tidaldecode.report.article import Article, Card, Table, environments_of, facts_of, model_of, page_figure
from tidaldecode.report.correction_plots import correction_panels
from tidaldecode.report.labels import budget_label, ratio, signed
from tidaldecode.report.results import Result
from tidaldecode.results.correction import CorrectionRow, rows_of


def correction_article(result: Result, name: str) -> Article:
    """Gap, time and acceptance of the plan alone, with correction, and of lossless decoding."""
    rows = rows_of(result.rows) if result.of_cells else [CorrectionRow.model_validate(row) for row in result.rows]
    figure = page_figure(
        f"{name}-correction",
        "Tokens between two passes with full attention",
        "Nats per token above full attention, milliseconds per token, and tokens that come out of a round of lossless "
        f"decoding; one colour a budget, lossless decoding dashed. {_windows(rows)}.",
        partial(correction_panels, rows),
    )
    return Article(
        title=f"Cache correction and lossless decoding, {model_of(result)}",
        file=result.file,
        facts=facts_of(result, "model", "figure"),
        cards=tuple(_card(result, rows)),
        figures=(figure,),
        tables=(_table(rows),),
        environments=environments_of(result),
    )


def _card(result: Result, rows: Sequence[CorrectionRow]) -> list[Card]:
    """The largest budget's tokens per round."""
    lossless = [row for row in rows if row.mode == "lossless" and row.accepted_per_round is not None]
    if not lossless:
        return []
    budget, plan = lossless[-1].budget, lossless[-1].plan
    own = [row for row in lossless if (row.budget, row.plan) == (budget, plan)]
    values = tuple((f"{row.accepted_per_round:.2f}", str(row.length)) for row in own)
    note = f"At most one more than are drafted; budget {budget_label(budget)}, {_windows(rows)}."
    return [Card("Tokens out of a lossless round", model_of(result), values, "tokens drafted", note)]


def _windows(rows: Sequence[CorrectionRow]) -> str:
    count = rows[0].windows
    return "1 window" if count == 1 else f"{count:,} windows"


def _table(rows: Sequence[CorrectionRow]) -> Table:
    columns = (
        "",
        "plan",
        "budget",
        "T",
        "gap, nats per token",
        "ms per token",
        "speed-up",
        "tokens per round",
        "other texts",
    )
    body = [
        (
            row.mode,
            row.plan or "–",
            budget_label(row.budget) or "–",
            "–" if row.length is None else str(row.length),
            signed(row.gap) + ("" if not row.gap_stderr else f" ± {row.gap_stderr:.3f}"),
            f"{row.ms_per_token:,.2f}",
            ratio(row.speedup),
            "–" if row.accepted_per_round is None else f"{row.accepted_per_round:.2f}",
            "–" if row.differing is None else f"{row.differing:,}",
        )
        for row in rows
    ]
    return Table("All numbers", columns, tuple(body))
