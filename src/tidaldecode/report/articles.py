"""The articles on files of results, a function for each kind of file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tidaldecode.report import losses, scores, speeds
from tidaldecode.report.article import Article, Figures, Table, article, drawn
from tidaldecode.report.compared import compared, left_out
from tidaldecode.report.folder import Result
from tidaldecode.report.labels import budget_label, counted, percent, signed, written
from tidaldecode.report.shares import SharesRead
from tidaldecode.results.correction import CorrectionRow, rows_of
from tidaldecode.results.needles import needle_summary
from tidaldecode.results.rows import MethodSettings, shared_rows
from tidaldecode.results.tasks import lm_eval_summary
from tidaldecode.results.whole_runs import whole_run_rows

_SAID_IN_ROWS = ("model", "nll", "full_nll", "gap", "accuracy", "full_accuracy", "figure", "figures")
_NEEDLE_CASE = ("length", "depth", "repeat")

Row = Mapping[str, Any]


def perplexity(result: Result, name: str, shares: SharesRead) -> Article:
    """The gap to full attention at each budget, and perplexity over position."""
    found = compared([result], shares)
    rows = [
        summary.model_dump() | {"method": summary.variant.label, "share": share, "perplexity": math.exp(summary.nll)}
        for summary, share in found.shares.items()
    ]
    numbers = Table.of("All numbers", rows, "method budget share nll full_nll perplexity windows tokens", folded=True)
    summaries = list(found.shares)
    figures: Figures = {losses.loss_over_budget: summaries, losses.perplexity_over_position: summaries}
    title = f"Perplexity of {result.model}"
    return article(result, title, drawn(name, figures, found.note), (found.table, numbers), *_SAID_IN_ROWS)


def needles(result: Result, name: str, shares: SharesRead) -> Article:
    """Needles found by length and depth; full attention first, then method by method."""
    cells = shared_rows(result.rows, _NEEDLE_CASE)
    summaries = needle_summary(cells.rows)
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
    figures = drawn(name, {scores.needle_heatmaps: summaries}, left_out(cells, "case"))
    return article(result, f"Needle in a haystack, {result.model}", figures, (table,), *_SAID_IN_ROWS)


def _range(shares: Sequence[float | None]) -> str:
    """`24 % to 27 %` of contexts of several lengths."""
    known = sorted(share for share in shares if share is not None)
    return " to ".join(dict.fromkeys(map(percent, known[:1] + known[-1:]))) or "–"


def _found(correct: int, total: int) -> str:
    return f"{correct:,}/{total:,}" if total else "–"


def tasks(result: Result, name: str, shares: SharesRead) -> Article:
    """The scores of lm-eval's tasks; the first metric of each is drawn."""
    found = lm_eval_summary(result.rows)
    first = {(score.task, score.length): score.metric for score in reversed(found)}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in found:
        row = {"task": score.task, "metric": score.metric.removesuffix(",none"), "samples": f"{score.samples:,}"}
        run = ", ".join(filter(None, (score.variant.label, budget_label(score.budget))))
        error = "" if score.stderr is None else f" ± {score.stderr:.2g}"
        read = "" if score.kv_read_fraction is None else f"\nreads {percent(score.kv_read_fraction)}"
        rows.setdefault((score.task, score.metric), row)[run] = f"{score.value:,.4g}{error}{read}"
    table = Table("Scores ± one standard error over the task's documents", list(rows.values()))
    shown = [score for score in found if score.metric == first[score.task, score.length]]
    figures = drawn(name, {scores.task_scores: shown})
    return article(result, f"lm-eval tasks, {result.model}", figures, (table,), "model")


def correction(result: Result, name: str, shares: SharesRead) -> Article:
    """Gap, time and acceptance of the plan alone, with correction, and of lossless decoding."""
    found = rows_of(result.rows) if result.of_cells else [CorrectionRow.model_validate(row) for row in result.rows]
    plans = {row.get("plan"): MethodSettings("tidal", plan_digest=row.get("plan_digest")) for row in result.rows}
    rows = [
        row.model_dump()
        | {"gap": signed(row.gap, row.gap_stderr or None)}
        | {"plan_share": shares.of(result, plans[row.plan], row.budget, result.context) if row.plan in plans else None}
        for row in found
    ]
    table = f"All numbers, over {counted(found[0].windows, 'window')}" + "; ± is one standard error" * (
        found[0].windows > 1
    )
    fields = "mode plan budget plan_share length gap ms_per_token speedup accepted_per_round differing"
    title = f"Cache correction and lossless decoding, {result.model}"
    figures = drawn(name, {losses.correction_panels: found})
    return article(result, title, figures, (Table.of(table, rows, fields),), "model", "figure")


def decode_steps(result: Result, name: str, shares: SharesRead) -> Article:
    """Milliseconds per token by method and context."""
    rows = sorted(result.rows, key=lambda row: row["context"])
    fields = "context method budget kv_read_fraction step_ms floor_ms speedup_vs_full"
    figures = drawn(name, {speeds.step_times: {"rows": result.rows}})
    table = Table.of("Decode steps", rows, fields)
    return article(result, f"Decode steps of {result.model}", figures, (table,), "model")


def whole_runs(result: Result, name: str, shares: SharesRead) -> Article:
    """Whole calls of generate: prefill, decoding and memory by method, context and batch."""
    rows = [
        row.model_dump()
        | {"method": row.variant.label + ("" if row.lossless is None else f", T = {row.lossless}")}
        | {"prefill": row.prefill_ms and row.prefill_ms / 1000, "all": row.total_ms and row.total_ms / 1000}
        for row in whole_run_rows(result.rows)
    ]
    fields = "context batch method budget kv_read_fraction prefill all speedup_vs_full decode_ms_per_token"
    fields += " decode_speedup_vs_full tokens_per_second accepted_per_round peak_memory_gib"
    table = Table.of("Time of all, and of decoding alone; without figures: out of memory", rows, fields)
    return article(result, f"Whole calls of generate, {result.model}", [], (table,), "model")


def operations(result: Result, name: str, shares: SharesRead) -> Article:
    """The attention of a decode step by method, and single operations."""
    rows = [row | {"share": step_share(row, result.rows)} for row in result.rows]
    steps = [row for row in rows if row["operation"].startswith("step ")]
    fields = "kv_heads batch context operation budget share us floor_us over_sdpa speedup_vs_full"
    tables = (
        Table.of("Attention of a decode step", steps, fields),
        Table.of("Every operation", rows, fields, folded=bool(steps)),
    )
    figures = drawn(name, {speeds.operation_times: {"layers": "all"} | result.fields | {"rows": result.rows}})
    return article(result, "Attention of a decode step", figures, tables)


def step_share(row: Row, rows: Sequence[Row]) -> float | None:
    """The share of K and V that a step reads: its floor is the time of these bytes, and so is full attention's."""
    shape = row["kv_heads"], row["batch"], row["context"]
    for full in rows if row["operation"].startswith("step ") else ():
        same = (full["kv_heads"], full["batch"], full["context"]) == shape
        if same and full["operation"].startswith("step full") and full["floor_us"] > 0:
            return float(row["floor_us"] / full["floor_us"])
    return None


def coherence(result: Result, name: str, shares: SharesRead) -> Article:
    """How much of what one layer attends to another layer's choice covers."""
    recalls = result.fields.get("recalls") or {"": result.fields["recall"]}
    figures: Figures = {scores.recall_heatmaps: recalls, scores.recall_over_distance: result.fields.get("distances")}
    said = ("model", "recall", "recalls", "distance", "distances", "figure", "distance_figure")
    return article(result, f"Coherence of {result.model}", drawn(name, figures), (), *said)


def calibration(result: Result, name: str, shares: SharesRead) -> Article:
    """What the search for a plan found."""
    fields, plans = result.fields, result.fields.get("frontier") or []
    share, error = fields.get("kv_read_fraction"), fields.get("heldout_error")
    gaps = {"searched": (fields["calibration_gap"], None), "held out": (fields["heldout_gap"], error)}
    rows = [{"text": on, "gap": signed(*gap), "share": share} for on, gap in gaps.items() if gap[0] is not None]
    layers = "full_layers select_layers quantized_select_layers token_budget"
    measures = "kv_read_fraction loss text_divergence calibration_gap heldout_gap heldout_error"
    best = Table.of("The best plans", plans, f"{layers} {measures}")
    title = "Gap of the calibrated plan ± one standard error over windows"
    tables = (Table.of(title, rows, "text gap share"), best)
    figures = drawn(name, {losses.frontier: plans})
    return article(result, f"Calibration: {result.model}", figures, tables, "model", "frontier", "plan", "figure")


def values(result: Result, name: str, shares: SharesRead) -> Article:
    """Values as they are; rows, and objects of objects, as tables."""
    tables = {}
    for key, value in result.fields.items():
        rows = value
        if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
            rows = [{"": name} | row for name, row in value.items()]
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            tables[key] = _as_they_are(key.capitalize(), rows)
    title = result.file.rpartition("/")[2].removesuffix(".json").replace("_", " ")
    return article(result, title, (), tables.values(), *tables)


def _as_they_are(title: str, rows: Sequence[Row]) -> Table:
    return Table(title, [{key.replace("_", " "): written(value) for key, value in row.items()} for row in rows])
