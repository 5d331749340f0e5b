"""Articles on speed: decode steps end to end, and the attention in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tidaldecode.report.article import (
    Article,
    Card,
    PageFigure,
    Table,
    devices_of,
    environments_of,
    facts_of,
    model_of,
    page_figure,
)
from tidaldecode.report.labels import budget_label, budget_words, percent, ratio
from tidaldecode.report.plots import decode_steps, step_bars
from tidaldecode.report.results import Result

Row = dict[str, Any]


def decode_article(result: Result, name: str) -> Article:
    """Milliseconds per token by method and context."""
    figure = page_figure(
        f"{name}-steps",
        "Time of a decode step",
        "Milliseconds from a token to the next over the context, a line for each method and budget; dashed: the time "
        "in which the bytes that the method needs can be read.",
        partial(decode_steps, result.rows),
    )
    card = _card(
        "Speed-up of a decode step",
        model_of(result),
        [row for row in result.rows if row["method"] == "tidal"],
        f"Whole steps against the faster full attention of the same run, on {devices_of(result) or 'a device unnamed'}",
    )
    return Article(
        title=f"Decode steps of {model_of(result)}",
        file=result.file,
        facts=facts_of(result, "model"),
        cards=card,
        figures=(figure,),
        tables=(_decode_table(result.rows),),
        environments=environments_of(result),
    )


def operations_article(result: Result, name: str) -> Article:
    """The attention of a decode step by method, and single operations."""
    steps = [row for row in result.rows if row["operation"].startswith("step ")]
    tables = [_operations_table("Every operation", result.rows, folded=bool(steps))]
    figures: list[PageFigure] = []
    cards: list[Card] = []
    if steps:
        figures.append(
            page_figure(
                f"{name}-attention",
                "Time of the attention of a decode step",
                "Milliseconds, and how much faster than full attention by torch’s scaled_dot_product_attention; a "
                "panel for each shape, a bar for each method and budget.",
                partial(step_bars, steps),
            )
        )
        tables.insert(0, _operations_table("Attention of a decode step", steps))
    for kv_heads, batch in dict.fromkeys((row["kv_heads"], row["batch"]) for row in steps):
        own = [row for row in steps if (row["kv_heads"], row["batch"]) == (kv_heads, batch)]
        cards += _card(
            "Speed-up of attention",
            f"{kv_heads} KV heads, batch {batch}",
            [row for row in own if row["operation"].startswith("step tidal")],
            f"Attention alone against torch’s, on {devices_of(result) or 'a device unnamed'}",
        )
    return Article(
        title="Attention of a decode step",
        file=result.file,
        facts=facts_of(result),
        cards=tuple(cards),
        figures=tuple(figures),
        tables=tuple(tables),
        environments=environments_of(result),
    )


def _card(heading: str, subject: str, rows: Sequence[Row], note: str) -> tuple[Card, ...]:
    """The best speed-up at each context; none where none was measured."""
    best: dict[int, Row] = {}
    for row in rows:
        known = best.get(row["context"])
        if row["speedup_vs_full"] is not None and (known is None or row["speedup_vs_full"] > known["speedup_vs_full"]):
            best[row["context"]] = row
    if not best:
        return ()
    budgets = dict.fromkeys(budget_words(row["budget"]) for row in best.values())
    values = tuple((ratio(best[context]["speedup_vs_full"]), f"{context:,}") for context in sorted(best))
    return (Card(heading, subject, values, "tokens of context", f"{note}; budget {' or '.join(budgets)}."),)


def _decode_table(rows: Sequence[Row]) -> Table:
    columns = ("context", "method", "budget", "ms per token", "floor", "speed-up", "KV read")
    body = [
        (
            f"{row['context']:,}",
            row["method"],
            budget_label(row["budget"]) or "–",
            f"{row['step_ms']:,.3f}",
            f"{row['floor_ms']:,.3f}",
            ratio(row["speedup_vs_full"]) or "–",
            percent(row["kv_read_fraction"]),
        )
        for row in sorted(rows, key=lambda row: row["context"])
    ]
    return Table("Decode steps", columns, tuple(body))


def _operations_table(title: str, rows: Sequence[Row], folded: bool = False) -> Table:
    columns = ("KV heads", "batch", "context", "operation", "budget", "µs", "floor", "over SDPA", "speed-up")
    body = [
        (
            f"{row['kv_heads']}",
            f"{row['batch']}",
            f"{row['context']:,}",
            row["operation"],
            budget_label(row["budget"]) or "–",
            f"{row['us']:,.1f}",
            f"{row['floor_us']:,.1f}",
            ratio(row["over_sdpa"]) or "–",
            ratio(row["speedup_vs_full"]) or "–",
        )
        for row in rows
    ]
    return Table(title, columns, tuple(body), folded)
