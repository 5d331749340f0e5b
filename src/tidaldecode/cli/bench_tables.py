"""Tables of `tidaldecode bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from tidaldecode.cli.tables import print_sets, print_table
from tidaldecode.report.labels import budget_label, ratio

if TYPE_CHECKING:
    from tidaldecode.bench.timing_report import TimingReport
    from tidaldecode.results.timings import DecodeRow, OperationRow

_OPERATIONS = ("operation", "budget", "µs", "floor", "over SDPA", "speed-up")
_DECODE = ("method", "context", "budget", "ms", "floor", "over it", "speed-up", "KV read")


def print_operations(console: Console, report: TimingReport[OperationRow]) -> None:
    """A table for each shape."""
    console.print(_title(report.about), highlight=False, soft_wrap=True, markup=False)
    shapes = dict.fromkeys((row.kv_heads, row.context) for row in report.rows)
    for kv_heads, context in shapes:
        rows = [row for row in report.rows if (row.kv_heads, row.context) == (kv_heads, context)]
        heads = rows[0].heads
        title = f"{heads} query heads, {kv_heads} KV heads, batch {rows[0].batch}, {context:,} tokens"
        print_table(console, title, _OPERATIONS, map(_operation, rows), no_wrap=True)
        if heads > kv_heads:
            print_sets(console, {"per_head, and step tidal": heads / kv_heads})


def _operation(row: OperationRow) -> tuple[str, ...]:
    times = f"{row.us:,.1f}", f"{row.floor_us:,.1f}"
    return row.operation, budget_label(row.budget), *times, ratio(row.over_sdpa), ratio(row.speedup_vs_full)


def print_decode(console: Console, report: TimingReport[DecodeRow]) -> None:
    """One table."""
    console.print(_title(report.about), highlight=False, soft_wrap=True, markup=False)
    kinds = {row.kv for row in report.rows}
    title = f"{report.about['model']}, batch {report.about['batch']}, {' and '.join(map(str, kinds))} K and V"
    print_table(console, title, _DECODE, map(_step, report.rows), no_wrap=True)
    sets = report.about["sets_per_kv_head"]
    if sets > 1 and any(row.method == "tidal" for row in report.rows):
        print_sets(console, {f"tidal, {report.about['plan'] or 'plan'}": sets})
    if not all(row.captured for row in report.rows):
        console.print("the steps did not run in a CUDA graph")


def _step(row: DecodeRow) -> tuple[str, ...]:
    times = f"{row.step_ms:,.3f}", f"{row.floor_ms:,.3f}", ratio(row.over_floor), ratio(row.speedup_vs_full)
    return row.method, f"{row.context:,}", budget_label(row.budget), *times, f"{row.kv_read_fraction:.1%}"


def _title(about: dict[str, Any]) -> str:
    return f"{about['device']}, {about['dtype']}; memory is read at {about['read_bandwidth_gbs']:,.0f} GB/s"
