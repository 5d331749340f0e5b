"""The articles on files of results, a function for each kind of file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tidaldecode.report.article import Article, Table, article, drawn, model_of
from tidaldecode.report.folder import Result
from tidaldecode.report.labels import budget_label, counted, percent, ratio, signed, written
from tidaldecode.report.losses import correction_panels, frontier, loss_over_budget, perplexity_over_position
from tidaldecode.report.scores import needle_heatmaps, recall_heatmaps, recall_over_distance, task_scores
from tidaldecode.report.shares import SharesRead
from tidaldecode.report.speeds import operation_times, step_times
from tidaldecode.results.correction_rows import CorrectionRow, rows_of
from tidaldecode.results.summary import (
    NeedleSummary,
    PplSummary,
    SharedRows,
    TaskScore,
    Variant,
    budgets_of,
    lm_eval_summary,
    needle_summary,
    ppl_summary,
    ppl_summary_of,
    shared_rows,
)

_SAID_IN_ROWS = (
    "model",
    "nll",
    "full_nll",
    "gap",
    "accuracy",
    "full_accuracy",
    "figure",
    "figures",
)  # of an object of --json
_NEEDLE_CASE = ("length", "depth", "repeat")

Budget = int | float | None


def perplexity(result: Result, name: str, shares: SharesRead) -> Article:
    """The gap to full attention at each budget, and perplexity over position."""
    cells = shared_rows(result.rows, ("window",)) if result.of_cells else None
    summaries = [ppl_summary_of(row) for row in result.rows] if cells is None else ppl_summary(cells.rows)
    note = "" if cells is None else left_out(cells, "window")
    read = {summary: share_of(result, summary, shares) for summary in summaries}
    figures = (
        drawn(
            f"{name}-budgets",
            "Gap to full attention at each token budget",
            "Nats per token above full attention, which is the dashed line; bars are one standard error over "
            f"{windows_of(summaries)}.{note}",
            loss_over_budget,
            summaries,
        ),
        drawn(
            f"{name}-position",
            "Perplexity over position",
            "Perplexity of the decoded tokens by their position in the context, one panel for each budget." + note,
            perplexity_over_position,
            summaries,
        ),
    )
    numbers = [
        {
            "method": summary.variant.label,
            "budget": budget_label(summary.budget) or "–",
            "K and V read": percent(read[summary]),
            "nats per token": f"{summary.nll:.4f}",
            "full attention": f"{summary.full_nll:.4f}",
            "perplexity": f"{math.exp(summary.nll):,.2f}",
            "windows": f"{summary.windows:,}",
            "tokens": f"{summary.tokens:,}",
        }
        for summary in summaries
    ]
    tables = (
        gap_table(read, 0 if cells is None or cells.shared else cells.known, windows_of(summaries).capitalize()),
        Table("All numbers", numbers, folded=True),
    )
    return article(result, f"Perplexity of {model_of(result)}", figures, tables, *_SAID_IN_ROWS)


def share_of(result: Result, summary: PplSummary, shares: SharesRead) -> float | None:
    """What a step of a method reads at the end of a window."""
    end = summary.first_position + len(summary.nll_by_position) * summary.bin_tokens
    context = result.fields.get("context")
    return shares.of(result, summary.variant, summary.budget, context if isinstance(context, int) else end)


def windows_of(summaries: Sequence[PplSummary]) -> str:
    """Over how many windows, and what full attention's loss is on them."""
    counts = sorted({summary.windows for summary in summaries})
    levels = {f"{summary.full_nll:.3f}" for summary in summaries}
    windows = counted(counts[0], "window") if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} windows"
    return windows + (f"; full attention’s loss is {levels.pop()}" if len(levels) == 1 else "")


def left_out(cells: SharedRows, what: str) -> str:
    """A sentence on what not every method and budget has, if there is such."""
    if cells.shared == cells.known:
        return ""
    if not cells.shared:
        return f" No {what} is common to all methods and budgets: they can’t be compared; † marks fewer than all."
    count = cells.known - cells.shared
    return f" Left out: {counted(count, what)} of {cells.known:,} that not every method and budget has."


def gap_table(read: Mapping[PplSummary, float | None], marked_below: int, of: str) -> Table:
    """Methods by budgets: what they lose, and below it what they read."""
    budgets = [budget_label(budget) for budget in budgets_of(read)]
    rows: dict[Variant, dict[str, str]] = {}
    for summary, share in read.items():
        if summary.budget is not None:
            row = rows.setdefault(summary.variant, {"method": summary.variant.label} | dict.fromkeys(budgets, "–"))
            mark = " †" if summary.windows < marked_below else ""
            reads = "" if share is None else f"\nreads {percent(share)}"
            row[budget_label(summary.budget)] = signed(summary.gap, summary.gap_stderr) + mark + reads
    title = f"{of}: gap by token budget, nats per token ± one standard error"
    title += "; below it the share of K and V that a step reads" if any(read.values()) else ""
    title += f"; † over fewer than all {marked_below:,} windows" if marked_below else ""
    return Table(title, list(rows.values()))


def needles(result: Result, name: str, shares: SharesRead) -> Article:
    """Needles found by length and depth."""
    cells = shared_rows(result.rows, _NEEDLE_CASE)
    summaries = needle_summary(cells.rows)
    figure = drawn(
        f"{name}-needles",
        "Share of the needles found",
        "One panel for each method and budget; columns are prompt lengths, rows the depth at which the needle lies. "
        "1 is every needle, 0 none." + left_out(cells, "case"),
        needle_heatmaps,
        summaries,
    )
    hidden = {tuple(row.get(name) for name in _NEEDLE_CASE): row["total"] for row in cells.rows}
    most = 0 if cells.shared else sum(hidden.values())
    lengths = sorted({cell.length for summary in summaries for cell in summary.cells})
    order = sorted(dict.fromkeys(s.variant for s in summaries), key=lambda variant: variant.method != "full")
    rows = [
        {"method": summary.variant.label, "budget": budget_label(summary.budget) or "–"}
        | {"K and V read": _range([shares.of(result, summary.variant, summary.budget, length) for length in lengths])}
        | {f"{length:,} tokens": _found(*summary.of_length(length)) for length in lengths}
        | {"all": _found(summary.correct, summary.total) + (" †" if summary.total < most else "")}
        for summary in sorted(summaries, key=lambda summary: order.index(summary.variant))
    ]
    table = Table(f"Needles found; † of fewer than all {most:,}" if most else "Needles found", rows)
    return article(result, f"Needle in a haystack, {model_of(result)}", (figure,), (table,), *_SAID_IN_ROWS)


def _range(shares: Sequence[float | None]) -> str:
    """`24 % to 27 %` of contexts of several lengths."""
    known = sorted(share for share in shares if share is not None)
    return " to ".join(dict.fromkeys(map(percent, known[:1] + known[-1:]))) or "–"


def _found(correct: int, total: int) -> str:
    return f"{correct:,}/{total:,}" if total else "–"


def tasks(result: Result, name: str, shares: SharesRead) -> Article:
    """The scores of lm-eval's tasks, the first metric of each drawn."""
    scores = lm_eval_summary(result.rows)
    first = {score.task: score.metric for score in reversed(scores)}
    figure = drawn(
        f"{name}-tasks",
        "Score of each task",
        "One point for each method and budget; bars are one standard error over the task's documents.",
        task_scores,
        [score for score in scores if score.metric == first[score.task]],
    )
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        metric = score.metric.removesuffix(",none")
        row = rows.setdefault(
            (score.task, metric), {"task": score.task, "metric": metric, "samples": f"{score.samples:,}"}
        )
        error = "" if score.stderr is None else f" ± {score.stderr:.2g}"
        run = ", ".join(filter(None, (score.variant.label, budget_label(score.budget))))
        row[run] = f"{score.value:,.4g}{error}"
    table = Table("Scores ± one standard error over the task's documents", list(rows.values()))
    return article(result, f"lm-eval tasks, {model_of(result)}", (figure,), (table,), "model")


def correction(result: Result, name: str, shares: SharesRead) -> Article:
    """Gap, time and acceptance of the plan alone, with correction, and of lossless decoding."""
    rows = rows_of(result.rows) if result.of_cells else [CorrectionRow(**row) for row in result.rows]
    digests = {row.get("plan"): row.get("plan_digest") for row in result.rows}
    windows, context = counted(rows[0].windows, "window"), result.fields.get("context")
    figure = drawn(
        f"{name}-correction",
        "Tokens between two passes with full attention",
        "Nats per token above full attention, milliseconds per token, and tokens that come out of a round of lossless "
        f"decoding; one colour a budget, lossless decoding dashed. Bars are one standard error over {windows}.",
        correction_panels,
        rows,
    )
    numbers = [
        {
            "": row.mode,
            "plan": row.plan or "–",
            "budget": budget_label(row.budget) or "–",
            "the plan reads": percent(
                shares.of(result, Variant("tidal", plan_digest=digests.get(row.plan)), row.budget, context)
            ),
            "T": written(row.length),
            "gap, nats per token": signed(row.gap, row.gap_stderr or None),
            "ms per token": f"{row.ms_per_token:,.2f}",
            "speed-up": ratio(row.speedup),
            "tokens per round": "–" if row.accepted_per_round is None else f"{row.accepted_per_round:.2f}",
            "other texts": written(row.differing),
        }
        for row in rows
    ]
    table = Table(f"All numbers; ± is one standard error over {windows}", numbers)
    title = f"Cache correction and lossless decoding, {model_of(result)}"
    return article(result, title, (figure,), (table,), "model", "figure")


def decode_steps(result: Result, name: str, shares: SharesRead) -> Article:
    """Milliseconds per token by method and context."""
    figure = drawn(
        f"{name}-steps",
        "Time of a decode step",
        "Milliseconds from a token to the next over the context, a line for each method and budget; dashed: the time "
        "in which the bytes that the method needs can be read.",
        step_times,
        result.rows,
    )
    rows = [
        {
            "context": f"{row['context']:,}",
            "method": row["method"],
            "budget": budget_label(row["budget"]) or "–",
            "ms per token": f"{row['step_ms']:,.3f}",
            "floor": f"{row['floor_ms']:,.3f}",
            "speed-up": ratio(row["speedup_vs_full"]),
            "K and V read": percent(row["kv_read_fraction"]),
        }
        for row in sorted(result.rows, key=lambda row: row["context"])
    ]
    return article(result, f"Decode steps of {model_of(result)}", (figure,), (Table("Decode steps", rows),), "model")


def operations(result: Result, name: str, shares: SharesRead) -> Article:
    """The attention of a decode step by method, and single operations."""
    figure = drawn(
        f"{name}-operations",
        "Time of a step’s attention, and of one layer’s operations",
        "Microseconds over the context, a line for each method or operation and budget; both scales are logarithmic.",
        operation_times,
        {"layers": "all"} | result.fields | {"rows": result.rows},
    )
    rows = [
        {
            "KV heads": f"{row['kv_heads']}",
            "batch": f"{row['batch']}",
            "context": f"{row['context']:,}",
            "operation": row["operation"],
            "budget": budget_label(row["budget"]) or "–",
            "K and V read": percent(step_share(row, result.rows)),
            "µs": f"{row['us']:,.1f}",
            "floor": f"{row['floor_us']:,.1f}",
            "over SDPA": ratio(row["over_sdpa"]),
            "speed-up": ratio(row["speedup_vs_full"]),
        }
        for row in result.rows
    ]
    steps = [row for row in rows if row["operation"].startswith("step ")]
    tables = (Table("Attention of a decode step", steps), Table("Every operation", rows, folded=bool(steps)))
    return article(result, "Attention of a decode step", (figure,), tables)


def step_share(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of K and V that a step reads: its floor is the time of these bytes, and so is full attention's."""
    shape = ("kv_heads", "batch", "context")
    for full in rows:
        if full["operation"] == "step full" and all(full[name] == row[name] for name in shape):
            return float(row["floor_us"] / full["floor_us"]) if row["operation"].startswith("step ") else None
    return None


def coherence(result: Result, name: str, shares: SharesRead) -> Article:
    """How much of what one layer attends to another layer's choice covers."""
    figures = (
        drawn(
            f"{name}-recall",
            "Recall between layers",
            "Share of the column layer’s attention that the row layer’s choice of tokens covers, 0 to 1.",
            recall_heatmaps,
            result.fields.get("recalls") or {"": result.fields["recall"]},
        ),
        drawn(
            f"{name}-distance",
            "Recall over distance",
            "The mean over all pairs of layers so far apart.",
            recall_over_distance,
            result.fields.get("distances"),
        ),
    )
    return article(
        result, f"Coherence of {model_of(result)}", figures, (), "recall", "recalls", "distance", "distances"
    )


def calibration(result: Result, name: str, shares: SharesRead) -> Article:
    """What the search for a plan found."""
    plans = result.fields.get("frontier") or []
    figure = drawn(
        f"{name}-frontier",
        "Loss over cost",
        "The best plans found: nats per token over the share of K and V that a step reads. Numbers at the points are "
        "full and select layers; bars are one standard error over windows.",
        frontier,
        plans,
    )
    gaps = [
        {
            "plan": "the chosen one",
            "text": text,
            "gap": signed(gap, error),
            "K and V read": percent(result.fields.get("kv_read_fraction")),
        }
        for text, gap, error in (
            ("searched", result.fields["calibration_gap"], None),
            ("held out", result.fields["heldout_gap"], result.fields.get("heldout_error")),
        )
        if gap is not None
    ]
    tables = (
        Table("Gap of the calibrated plan, nats per token ± one standard error over windows", gaps),
        _as_it_is("The best plans", [{key: value for key, value in row.items() if key != "plan"} for row in plans]),
    )
    return article(result, f"Calibration: {model_of(result)}", (figure,), tables, "frontier", "plan")


def values(result: Result, name: str, shares: SharesRead) -> Article:
    """Values as they are; rows, and objects of objects, as tables."""
    tables = {}
    for key, value in result.fields.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables[key] = _as_it_is(key.capitalize(), value)
        elif isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            tables[key] = _as_it_is(key.capitalize(), [{"": row_name} | row for row_name, row in value.items()])
    title = result.file.rpartition("/")[2].removesuffix(".json").replace("_", " ")
    return article(result, title, (), tables.values(), *tables)


def _as_it_is(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(title, [{key.replace("_", " "): written(value) for key, value in row.items()} for row in rows])
