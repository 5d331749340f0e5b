"""What a page opens with: what methods lose over what they read, and how much faster they are than full attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidaldecode.report.article import Article, Table, drawn, model_of
from tidaldecode.report.articles import gap_table, left_out, share_of, step_share, windows_of
from tidaldecode.report.folder import Result, plans_told_apart
from tidaldecode.report.labels import budget_label, percent, ratio
from tidaldecode.report.losses import loss_over_share
from tidaldecode.report.shares import SharesRead
from tidaldecode.report.speeds import speed_ups
from tidaldecode.results.summary import PplSummary, budgets_of, ppl_summary, ppl_summary_of, shared_rows, variant_of

_MOST = 12  # panels of a figure

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Comparison:
    """Methods on the same windows of a text.

    Attributes:
        read: the share of K and V that each method reads at each budget, where it is known.
        note: what is left out.
        marked_below: windows that a method must have not to be marked; 0 where all have the same.
    """

    title: str
    read: Mapping[PplSummary, float | None]
    note: str
    marked_below: int

    @property
    def extent(self) -> tuple[int, int]:
        """Budgets, and methods at budgets."""
        return len(budgets_of(self.read)), len(self.read)


@dataclass(frozen=True)
class _Shape:
    """A model, or a shape of attention, whose steps were timed at one batch.

    Attributes:
        rows: `method`, `context`, `budget`, `speedup_vs_full`, `ms` and `share` of each method with a budget.
    """

    attention_alone: bool
    batch: int
    title: str
    rows: Sequence[Row]


def losses(results: Sequence[Result], shares: SharesRead) -> Article | None:
    """What methods lose over what they read: of each model the windows on which most budgets were tried."""
    best: dict[str, _Comparison] = {}
    for group in _same_windows(results):
        found, model = _compared(group, shares), model_of(group[0])
        if found.extent[0] and (model not in best or found.extent > best[model].extent):
            best[model] = found
    if not best:
        return None
    points = {
        found.title: {s: share for s, share in found.read.items() if share is not None and s.budget is not None}
        for found in best.values()
    }
    unknown = {s.variant.label: 0 for found in best.values() for s, share in found.read.items() if share is None}
    figure = drawn(
        "loss",
        "Loss over what is read",
        "Nats per token above full attention over the share of K and V that a decode step reads: the lower left is "
        "better. Both scales are logarithmic, that of losses linear near 0. The oracle, dashed, reads the best tokens "
        "that scores can choose and saves no time: it is the floor. Bars are one standard error over windows."
        + "".join(found.note for found in best.values())
        + (f" Not drawn, as this folder does not say what they read: {'; '.join(unknown)}." if unknown else ""),
        loss_over_share,
        {title: shown for title, shown in points.items() if shown},
    )
    tables = [gap_table(found.read, found.marked_below, found.title) for found in best.values()]
    return Article("Loss", (figure,) if figure else (), tuple(tables))


def _same_windows(results: Sequence[Result]) -> list[list[Result]]:
    """Files of perplexity, those together in which methods decoded the same tokens by the same model."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        if result.kind == "ppl":
            fields = (repr(result.fields.get(name)) for name in ("model", "dtype", "text", "context", "decode"))
            windows = frozenset(row["window"] for row in result.rows) if result.of_cells else result.file
            groups.setdefault((windows, *fields), []).append(result)
    return list(groups.values())


def _compared(group: Sequence[Result], shares: SharesRead) -> _Comparison:
    note, marked_below = "", 0
    if group[0].of_cells:
        rows: dict[Any, dict[str, Any]] = {}
        for row in (row for result in group for row in result.rows):
            rows.setdefault((row["window"], variant_of(row), repr(row["budget"])), row)
        cells = shared_rows(plans_told_apart(list(rows.values())), ("window",))
        summaries, note = ppl_summary(cells.rows), left_out(cells, "window")
        marked_below = 0 if cells.shared else cells.known
    else:
        summaries = [ppl_summary_of(row) for row in group[0].rows]
    read = {summary: share_of(group[0], summary, shares) for summary in summaries}
    return _Comparison(f"{model_of(group[0])}, {windows_of(summaries)}", read, note, marked_below)


def speeds(results: Sequence[Result]) -> Article | None:
    """How much faster than full attention each method is, by model or shape and by batch."""
    found = [shape for result in results for shape in _shapes(result) if shape.rows]
    found = sorted(found, key=lambda shape: (shape.attention_alone, shape.batch))
    if not found:
        return None
    shapes = {f"{shape.title}{' ' * index}": shape.rows for index, shape in enumerate(found)}  # titles may be the same
    contexts = sorted({row["context"] for shape in found for row in shape.rows})
    table: dict[Any, dict[str, str]] = {}
    for shape in found:
        for row in shape.rows:
            first = {"measured": shape.title, "method": row["method"], "budget": budget_label(row["budget"])}
            line = table.setdefault((id(shape), *first.values()), first | {f"{c:,} tokens": "–" for c in contexts})
            cell = f"{ratio(row['speedup_vs_full'])}\n{row['ms']:,.3g} ms, reads {percent(row['share'])}"
            line[f"{row['context']:,} tokens"] = cell
    figure = drawn(
        "speed",
        "Speed over context",
        "How many times as fast as full attention, the dashed line, a decode step is: whole steps of a model, from a "
        "token to the next, or the attention in them alone. The more of the context a method leaves unread, the faster."
        + (f" The first {_MOST} of {len(found)} are drawn; the table has all." if len(found) > _MOST else ""),
        speed_ups,
        dict(list(shapes.items())[:_MOST]),
    )
    title = (
        "Times as fast as full attention, by context; below it milliseconds and the share of K and V that a step reads"
    )
    return Article("Speed", (figure,) if figure else (), (Table(title, list(table.values())),))


def _shapes(result: Result) -> Iterator[_Shape]:
    on = result.devices or "a device unnamed"
    if result.kind == "decode":
        batch = result.fields.get("batch") or 1
        rows = [row | {"ms": row["step_ms"], "share": row["kv_read_fraction"]} for row in result.rows]
        yield _Shape(False, batch, f"{model_of(result)}, batch {batch}:\nwhole step, {on}", _with_budget(rows))
    if result.kind == "ops":
        steps = [
            row | {"method": row["operation"].removeprefix("step "), "ms": row["us"] / 1000}
            | {"share": step_share(row, result.rows)}
            for row in result.rows if row["operation"].startswith("step ")
        ]  # fmt: skip
        for heads, batch in dict.fromkeys((row["kv_heads"], row["batch"]) for row in steps):
            own = [row for row in steps if (row["kv_heads"], row["batch"]) == (heads, batch)]
            yield _Shape(True, batch, f"{heads} KV heads, batch {batch}:\nattention alone, {on}", _with_budget(own))


def _with_budget(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["budget"] is not None and row["speedup_vs_full"] is not None]
