"""Tables of `tidaldecode bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidaldecode.cli.sets import print_sets

if TYPE_CHECKING:
    from tidaldecode.bench.timing_report import TimingReport
    from tidaldecode.results.timings import DecodeRow, OperationRow


def print_operations(console: Console, report: TimingReport[OperationRow]) -> None:
    """A table for each shape."""
    console.print(_title(report.about), highlight=False, soft_wrap=True, markup=False)
    shapes = dict.fromkeys((row.kv_heads, row.context) for row in report.rows)
    for kv_heads, context in shapes:
        rows = [row for row in report.rows if (row.kv_heads, row.context) == (kv_heads, context)]
        title = f"{rows[0].heads} query heads, {kv_heads} KV heads, batch {rows[0].batch}, {context:,} tokens"
        table = _table(title, "operation", "budget", "µs", "floor", "over SDPA", "speed-up")
        for row in rows:
            figures = (f"{row.us:,.1f}", f"{row.floor_us:,.1f}", _ratio(row.over_sdpa), _ratio(row.speedup_vs_full))
            table.add_row(row.operation, _budget(row.budget), *figures)
        console.print(table)
        if rows[0].heads > kv_heads:
            print_sets(console, {"per_head, and step tidal": rows[0].heads / kv_heads})


def print_decode(console: Console, report: TimingReport[DecodeRow]) -> None:
    """One table."""
    console.print(_title(report.about), highlight=False, soft_wrap=True, markup=False)
    title = f"{report.about['model']}, batch {report.about['batch']}"
    table = _table(title, "method", "context", "budget", "ms", "floor", "over it", "speed-up", "KV read")
    for row in report.rows:
        figures = (f"{row.step_ms:,.3f}", f"{row.floor_ms:,.3f}", _ratio(row.over_floor), _ratio(row.speedup_vs_full))
        table.add_row(row.method, f"{row.context:,}", _budget(row.budget), *figures, f"{row.kv_read_fraction:.1%}")
    console.print(table)
    sets = report.about["sets_per_kv_head"]
    if sets > 1 and any(row.method == "tidal" for row in report.rows):
        print_sets(console, {f"tidal, {report.about['plan'] or 'plan'}": sets})
    if not all(row.captured for row in report.rows):
        console.print("the steps did not run in a CUDA graph")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=Text(title))
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _title(about: dict[str, Any]) -> str:
    return f"{about['device']}, {about['dtype']}; memory is read at {about['read_bandwidth_gbs']:,.0f} GB/s"


def _budget(budget: int | float | None) -> str:
    if budget is None:
        return ""
    return f"{budget:,}" if isinstance(budget, int) else f"{budget:g}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
