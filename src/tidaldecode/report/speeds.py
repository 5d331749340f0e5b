"""Figures of times and speed-ups over the context, from the rows of `bench decode` and `bench ops`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.report.drawing import (
    MUTED,
    add_legend,
    draw_line,
    label_panels,
    line_styles,
    panels,
    save_png,
    set_ticks,
)
from tidaldecode.report.labels import budget_label, context_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_LAYER_OPERATIONS = ("sdpa", "flashinfer", "full", "select", "sparse")
_DASHES = ("-", (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def plot_operations(results: dict[str, Any], path: Path) -> None:
    """Writes `operation_times` as a PNG file.

    Args:
        results: the JSON of `bench ops`.
        path: the PNG file.
    """
    save_png(operation_times, results, path, f"{results['device']}, {results['dtype']}")


def plot_decode(results: dict[str, Any], path: Path) -> None:
    """Writes `step_times` as a PNG file.

    Args:
        results: the JSON of `bench decode`.
        path: the PNG file.
    """
    title = f"{results['model']}, batch {results['batch']}: {results['device']}, {results['dtype']}"
    save_png(step_times, results["rows"], path, title)


def speed_ups(shapes: Sequence[tuple[str, Sequence[Row]]], width: float) -> Figure | None:
    """How much faster than full attention each method is over the context, a panel for each shape and batch.

    Args:
        shapes: titles, each with the rows of methods that have a budget.
        width: inches.
    """
    if not shapes:
        return None
    columns = min(len(shapes), 3 if width > 5 else 1)
    height = 2.1 * -(-len(shapes) // columns) + 0.9
    figure, axes = panels(width, height, len(shapes), columns, sharey=True)
    for axis, (title, rows) in zip(axes, shapes, strict=True):
        axis.axhline(1, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, label="full attention")
        _logarithmic(axis)
        _lines(axis, rows, "speedup_vs_full", [row for _, own in shapes for row in own])
        axis.set_title(title, fontsize=7.5)
    label_panels(axes, columns, "context, tokens", "times as fast")
    add_legend(figure, width)
    return figure


def step_times(rows: Sequence[Row], width: float) -> Figure:
    """Milliseconds per token over the context, a line for each method and budget, its floor dashed."""
    figure, (axis,) = panels(width, 3.7)
    _lines(axis, rows, "step_ms", rows)
    _lines(axis, rows, "floor_ms", rows, label=None, marker="", linestyle="--", linewidth=1)
    axis.set(xlabel="context, tokens", ylabel="ms per token; dashed: floor", ylim=(0, None))
    add_legend(figure, width)
    return figure


def operation_times(results: Mapping[str, Any], width: float) -> Figure:
    """Time of a decode step's attention (above) and of one layer's operations (below) over the context.

    Args:
        results: the JSON of `bench ops`; a column for each number of KV heads, where the figure is wide.
        width: inches.
    """
    rows: list[Row] = results["rows"]
    shapes = sorted({row["kv_heads"] for row in rows})
    names = {f"attention of a step of {results['layers']} layers": ("step",), "one layer": _LAYER_OPERATIONS}
    columns = len(shapes) if width > 5 else 1
    count = len(shapes) * len(names)
    figure, axes = panels(width, 3.2 * count / columns + 2, count, columns)
    panel = iter(axes)
    for title, operations in names.items():
        for kv_heads in shapes:
            axis, own = next(panel), [row for row in rows if row["kv_heads"] == kv_heads]
            shown = [row for row in own if row["operation"].split()[0] in operations]
            _logarithmic(axis)
            _lines(axis, shown, "us", rows)
            heads = f"{own[0]['heads']} query heads, {kv_heads} KV heads, batch {own[0]['batch']}"
            axis.set_title(f"{heads}:\n{title}", fontsize=8)
    label_panels(axes, columns, "context, tokens", "µs")
    add_legend(figure, width)
    return figure


def _lines(axis: Axes, rows: Sequence[Row], field: str, among: Sequence[Row], **more: Any) -> None:
    """A line for each method and budget: colour and marker for the one, dashes for the other, as among all rows."""
    names, budgets = (list(dict.fromkeys(values)) for values in zip(*map(_named, among), strict=True))
    styles = dict(zip(names, line_styles([_method(name) for name in names]), strict=True))
    for name, budget in dict.fromkeys(map(_named, rows)):
        own = sorted((row for row in rows if _named(row) == (name, budget)), key=lambda row: row["context"])
        label = ", ".join(filter(None, (name, budget_label(budget))))
        style = {"label": label, "linestyle": _DASHES[budgets.index(budget) % len(_DASHES)]} | more
        draw_line(axis, [row["context"] for row in own], [row[field] for row in own], styles[name], **style)
    set_ticks(axis, {context: context_label(context) for context in sorted({row["context"] for row in rows})})


def _named(row: Row) -> tuple[str, int | float | None]:
    return row.get("method") or row["operation"], row["budget"]


def _method(name: str) -> str:
    return "sdpa" if "sdpa" in name else name.removeprefix("step ")


def _logarithmic(axis: Axes) -> None:
    """From one sparse layer to a whole step there are orders of magnitude."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(xscale="log", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_locator(NullLocator())
