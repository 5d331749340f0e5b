"""Figures of times and speed-ups over the context, from the rows of `bench decode` and `bench ops`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode.report.drawing import Line, line_panels, line_styles, set_ticks
from tidaldecode.report.labels import budget_label, context_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_OPERATIONS = ("sdpa", "flashinfer", "full", "select", "sparse")
_LOGARITHMIC = {"xscale": "log", "yscale": "log"}
_DASHES = ("-", (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def speed_ups(shapes: Sequence[tuple[str, Sequence[Row]]], width: float) -> Figure:
    """Speed over context.

    How many times as fast as full attention, the dashed line, a decode step is: whole steps of a model, from a token to
    the next, or the attention in them alone, by batch.

    Args:
        shapes: titles, each with the rows of methods that have a budget.
        width: inches.
    """
    among = [row for _, rows in shapes for row in rows]
    shown = [(title, _lines(rows, "speedup_vs_full", among)) for title, rows in shapes]
    columns = min(len(shapes), 3 if width > 5 else 1)
    labels = "context, tokens", "times as fast"
    figure, axes = line_panels(width, 2.0, shown, *labels, columns, level=1, scales=_LOGARITHMIC, sharey=True)
    for axis, (_, rows) in zip(axes, shapes, strict=True):
        _finish(axis, rows)
    return figure


def step_times(results: Mapping[str, Any], width: float) -> Figure:
    """Time of a decode step.

    Milliseconds from a token to the next over the context, a line for each method and budget; dashed: the time in which
    the bytes that the method needs can be read.

    Args:
        results: the JSON of `bench decode`.
        width: inches.
    """
    rows = results["rows"]
    floors = _lines(rows, "floor_ms", rows, label=None, marker="", linestyle="--", linewidth=1)
    shown = [("", [*_lines(rows, "step_ms", rows), *floors])]
    figure, (axis,) = line_panels(width, 2.9, shown, "context, tokens", "ms per token; dashed: floor")
    axis.set_ylim(bottom=0)
    set_ticks(axis, _contexts(rows))
    return figure


def operation_times(results: Mapping[str, Any], width: float) -> Figure:
    """Time of a step’s attention, and of one layer’s operations.

    Microseconds over the context, a line for each method or operation and budget; both scales are logarithmic.

    Args:
        results: the JSON of `bench ops`; a column for each number of KV heads, where the figure is wide.
        width: inches.
    """
    panels = {}
    for what, names in ((f"attention of a step of {results['layers']} layers", ("step",)), ("one layer", _OPERATIONS)):
        for kv_heads in sorted({row["kv_heads"] for row in results["rows"]}):
            own = [row for row in results["rows"] if row["kv_heads"] == kv_heads]
            heads = f"{own[0]['heads']} query heads, {kv_heads} KV heads, batch {own[0]['batch']}"
            panels[f"{heads}:\n{what}"] = [row for row in own if row["operation"].partition(" ")[0] in names]
    shown = [(title, _lines(rows, "us", results["rows"])) for title, rows in panels.items()]
    columns = len(shown) // 2 if width > 5 else 1
    figure, axes = line_panels(width, 2.9, shown, "context, tokens", "µs", columns, scales=_LOGARITHMIC)
    for axis, rows in zip(axes, panels.values(), strict=True):
        _finish(axis, rows)
    return figure


def _lines(rows: Sequence[Row], field: str, among: Sequence[Row], **more: Any) -> list[Line]:
    """A line for each method and budget: colour and marker for the one, dashes for the other, as among all rows."""
    names, budgets = (list(dict.fromkeys(values)) for values in zip(*map(_named, among), strict=True))
    styles = dict(zip(names, line_styles([_method(name) for name in names]), strict=True))
    lines = []
    for name, budget in dict.fromkeys(map(_named, rows)):
        own = sorted((row for row in rows if _named(row) == (name, budget)), key=lambda row: row["context"])
        label = ", ".join(filter(None, (name, budget_label(budget))))
        look = {"linestyle": _DASHES[budgets.index(budget) % len(_DASHES)]} | more
        lines.append(Line(label, styles[name], [r["context"] for r in own], [r[field] for r in own], None, look))
    return lines


def _named(row: Row) -> tuple[str, int | float | None]:
    return row.get("method") or row["operation"], row["budget"]


def _method(name: str) -> str:
    return "sdpa" if "sdpa" in name else name.removeprefix("step ")


def _contexts(rows: Sequence[Row]) -> dict[float, str]:
    return {context: context_label(context) for context in sorted({row["context"] for row in rows})}


def _finish(axis: Axes, rows: Sequence[Row]) -> None:
    """From one sparse layer to a whole step there are orders of magnitude."""
    from matplotlib.ticker import LogLocator, NullLocator

    set_ticks(axis, _contexts(rows))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_locator(NullLocator())
