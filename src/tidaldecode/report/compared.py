"""Methods on the same windows of a text: what they lose at each budget, and what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tidaldecode.report.article import Table
from tidaldecode.report.folder import Result, plans_told_apart
from tidaldecode.report.labels import budget_label, counted, percent, signed
from tidaldecode.report.shares import SharesRead
from tidaldecode.results.perplexity import PplSummary, ppl_summary
from tidaldecode.results.rows import MethodSettings, SharedRows, budgets_of, shared_rows

_ORDER = {"full": 0, "tidal": 0, "oracle": 2}  # and the others between

Shares = Mapping[PplSummary, float | None]
"""The share of K and V that a step of each method reads at each budget, where it is known."""


@dataclass(frozen=True)
class Compared:
    """What files of perplexity say together.

    Attributes:
        windows: of which model and over how many windows.
        note: what is left out, or nothing.
        table: methods by budgets: what they lose, and below it what they read.
    """

    windows: str
    shares: Shares
    note: str
    table: Table


def compared(results: Sequence[Result], shares_read: SharesRead) -> Compared:
    """The comparison of files whose windows are the same; of what several hold the first one's is taken."""
    first, note, marked_below = results[0], "", 0
    if first.of_cells:
        rows = {
            (MethodSettings.of(row), repr(row["budget"]), row["window"]): row
            for row in reversed([row for result in results for row in result.rows])
        }
        cells = shared_rows(plans_told_apart(list(rows.values())[::-1]), ("window",))
        summaries, note = ppl_summary(cells.rows), left_out(cells, "window")
        marked_below = 0 if cells.shared else cells.known
    else:
        summaries = [PplSummary.model_validate(row) for row in first.rows]
    summaries.sort(key=lambda summary: _ORDER.get(summary.method, 1))
    counts = sorted({summary.windows for summary in summaries})
    windows = counted(counts[0], "window") if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} windows"
    levels = {f"{summary.full_nll:.3f}" for summary in summaries}
    words = f"{first.model}, {windows}" + (f", full attention’s loss {levels.pop()}" if len(levels) == 1 else "")
    shares = {s: _share(s, first, shares_read) for s in summaries}
    return Compared(words, shares, note, _gap_table(shares, words, marked_below, note))


def _share(summary: PplSummary, result: Result, shares_read: SharesRead) -> float | None:
    """As the row says it; files of earlier versions leave it to be computed."""
    if summary.kv_read_fraction is not None:
        return summary.kv_read_fraction
    return shares_read.of(result, summary.variant, summary.budget, result.context or _end(summary))


def left_out(cells: SharedRows, what: str) -> str:
    """A sentence on what not every method and budget has, if there is such."""
    if cells.shared == cells.known:
        return ""
    if not cells.shared:
        return f" No {what} is common to all methods and budgets: they can’t be compared; † marks fewer than all."
    count = cells.known - cells.shared
    return f" Left out: {counted(count, what)} of {cells.known:,} that not every method and budget has."


def _end(summary: PplSummary) -> int:
    return summary.first_position + len(summary.nll_by_position) * summary.bin_tokens


def _gap_table(shares: Shares, words: str, marked_below: int, note: str) -> Table:
    budgets = [budget_label(budget) for budget in budgets_of(shares)]
    rows: dict[MethodSettings, dict[str, str]] = {}
    for summary, share in shares.items():
        if summary.budget is not None:
            row = rows.setdefault(summary.variant, {"method": summary.variant.label} | dict.fromkeys(budgets, "–"))
            mark = " †" if summary.windows < marked_below else ""
            reads = "" if share is None else f"\nreads {percent(share)}"
            row[budget_label(summary.budget)] = signed(summary.gap, summary.gap_stderr) + mark + reads
    title = f"{words}: gap by token budget, nats per token ± one standard error"
    title += (
        "; below it the share of K and V that a step reads"
        if any(share for summary, share in shares.items() if summary.budget)
        else ""
    )
    title += f"; † over fewer than all {marked_below:,} windows" if marked_below else ""
    return Table(f"{title}.{note}", list(rows.values()))
