"""What a page opens with: what methods lose over what they read, and how much faster they are than full attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tidaldecode.report.article import Article, Table, drawn
from tidaldecode.report.articles import step_share
from tidaldecode.report.compared import Compared, compared
from tidaldecode.report.folder import Result
from tidaldecode.report.labels import budget_label, percent, ratio
from tidaldecode.report.losses import loss_over_share
from tidaldecode.report.shares import SharesRead
from tidaldecode.report.speeds import speed_ups
from tidaldecode.results.perplexity import PplSummary
from tidaldecode.results.rows import budgets_of

_MOST = 12  # panels of a figure

Row = Mapping[str, Any]


def losses(results: Sequence[Result], shares: SharesRead) -> Article | None:
    """What methods lose over what they read: of each model the windows on which most budgets were tried."""
    best: dict[str, Compared] = {}
    for group in _same_windows(results):
        found, model = compared(group, shares), group[0].model
        if budgets_of(found.shares) and (model not in best or _extent(found) > _extent(best[model])):
            best[model] = found
    if not best:
        return None
    groups: dict[str, Mapping[PplSummary, float]] = {}
    unknown: dict[str, None] = {}
    for found in best.values():
        known = {summary: share for summary, share in found.shares.items() if share is not None}
        unknown |= {summary.variant.label: None for summary in found.shares if summary not in known}
        if budgets_of(known):
            groups[found.windows] = {summary: share for summary, share in known.items() if summary.budget is not None}
    note = "".join(found.note for found in best.values())
    if unknown:
        note += (
            f" Not drawn, as the folder does not have the plan or shape that says what they read: {'; '.join(unknown)}."
        )
    return Article("Loss", drawn("opening-", {loss_over_share: groups}, note), [found.table for found in best.values()])


def _same_windows(results: Sequence[Result]) -> list[list[Result]]:
    """Files of perplexity, those together in which methods decoded the same tokens by the same model."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        if result.kind == "ppl":
            fields = (repr(result.fields.get(name)) for name in ("model", "dtype", "text", "context", "decode"))
            windows = frozenset(row["window"] for row in result.rows) if result.of_cells else result.file
            groups.setdefault((windows, *fields), []).append(result)
    return list(groups.values())


def _extent(found: Compared) -> tuple[int, int]:
    return len(budgets_of(found.shares)), len(found.shares)


def speeds(results: Sequence[Result]) -> Article | None:
    """How much faster than full attention each method is, by model or shape and by batch."""
    shapes = [shape for result in results for shape in _shapes(result).items()]
    shapes.sort(key=lambda shape: (shape[1][0]["what"] != "whole step", shape[1][0]["batch"]))
    if not shapes:
        return None
    contexts = sorted({row["context"] for _, rows in shapes for row in rows})
    columns = {f"{context:,} tokens": "–" for context in contexts}
    table: dict[Any, dict[str, str]] = {}
    for index, (title, rows) in enumerate(shapes):
        for row in rows:
            first = {"measured": title, "method": row["method"], "budget": budget_label(row["budget"])}
            cell = f"{ratio(row['speedup_vs_full'])}\n{row['ms']:,.3g} ms, reads {percent(row['share'])}"
            table.setdefault((index, *first.values()), first | columns)[f"{row['context']:,} tokens"] = cell
    note = f" The first {_MOST} of {len(shapes)} are drawn; the table has all." if len(shapes) > _MOST else ""
    title = "Times as fast as full attention by context; below it the time and the share of K and V that a step reads"
    return Article("Speed", drawn("opening-", {speed_ups: shapes[:_MOST]}, note), [Table(title, list(table.values()))])


def _shapes(result: Result) -> dict[str, list[Row]]:
    """Models, or shapes of attention, at each batch, with the rows of methods that have a budget."""
    rows: list[dict[str, Any]] = []
    if result.kind == "decode":
        batch = result.fields.get("batch")
        same = {"shape": result.model, "batch": batch if isinstance(batch, int) else 1, "what": "whole step"}
        rows = [row | same | {"ms": row["step_ms"], "share": row["kv_read_fraction"]} for row in result.rows]
    if result.kind == "ops":
        rows = [
            row
            | {"shape": f"{row['kv_heads']} KV heads", "what": "attention alone", "ms": row["us"] / 1000}
            | {"method": row["operation"].removeprefix("step "), "share": step_share(row, result.rows)}
            for row in result.rows
            if row["operation"].startswith("step ")
        ]
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        if row["budget"] is not None and row["speedup_vs_full"] is not None:
            on = f", {result.devices}" if result.devices else ""
            shapes.setdefault(f"{row['shape']}, batch {row['batch']}:\n{row['what']}{on}", []).append(row)
    return shapes
