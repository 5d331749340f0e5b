"""Figures of measured times, from the JSON of `bench ops` and `bench decode`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

_LAYER_OPERATIONS = ("sdpa", "flashinfer", "full", "select", "sparse")


def check_matplotlib() -> None:
    """Refuses to plot where there is nothing to plot with.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: pip install 'tidaldecode[plot]', or leave out --output")


def plot_operations(results: dict[str, Any], path: Path) -> None:
    """Time of a decode step's attention (above) and of one layer's operations (below) against the context.

    Args:
        results: the JSON of `bench ops`; one column of figures for each number of KV heads.
        path: the PNG file.
    """
    rows: list[Row] = results["rows"]
    kv_heads = sorted(_distinct(rows, "kv_heads"))
    figure, axes = _figure(2, len(kv_heads))
    for column, heads in enumerate(kv_heads):
        own = [row for row in rows if row["kv_heads"] == heads]
        shape = f"{own[0]['heads']} query heads, {heads} KV heads, batch {own[0]['batch']}"
        panels = {f"attention of a step of {results['layers']} layers": ("step",), "one layer": _LAYER_OPERATIONS}
        for axis, (title, operations) in zip(axes[:, column], panels.items(), strict=True):
            shown = [row for row in own if row["operation"].split()[0] in operations]
            _lines(axis, shown, "operation", "us")
            _logarithmic(axis)
            _finish(axis, shown, f"{shape}: {title}", "µs")
    figure.suptitle(f"{results['device']}, {results['dtype']}")
    _save(figure, path)


def plot_decode(results: dict[str, Any], path: Path) -> None:
    """Milliseconds per token against the context, a line for each method, its floor dashed.

    Args:
        results: the JSON of `bench decode`.
        path: the PNG file.
    """
    figure, axes = _figure(1, 1)
    axis = axes[0, 0]
    _lines(axis, results["rows"], "method", "step_ms", floor="floor_ms")
    _finish(axis, results["rows"], f"{results['model']}, batch {results['batch']}; dashed: floor", "ms per token")
    axis.set_ylim(bottom=0)
    figure.suptitle(f"{results['device']}, {results['dtype']}")
    _save(figure, path)


def _figure(rows: int, columns: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 * columns, 5 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _lines(axis: Axes, rows: Sequence[Row], name: str, time: str, *, floor: str | None = None) -> None:
    """A line for each operation or method and budget: a colour for the one, a marker for the other."""
    names, budgets = _distinct(rows, name), _distinct(rows, "budget")
    for row_name in names:
        for budget in budgets:
            points = [row for row in rows if (row[name], row["budget"]) == (row_name, budget)]
            if not points:
                continue
            points.sort(key=lambda row: row["context"])
            contexts = [row["context"] for row in points]
            color = f"C{names.index(row_name)}"
            marker = "o^sDvPX*"[budgets.index(budget) % 8]
            label = row_name if budget is None else f"{row_name}, {_budget(budget)}"
            axis.plot(contexts, [row[time] for row in points], color=color, marker=marker, label=label)
            if floor is not None:
                axis.plot(contexts, [row[floor] for row in points], color=color, linestyle="--")


def _distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """The values of a key in the order in which they were measured."""
    return list(dict.fromkeys(row[key] for row in rows))


def _budget(budget: int | float) -> str:
    return f"{budget:.0%} of the context" if isinstance(budget, float) else f"{budget:,} tokens"


def _finish(axis: Axes, rows: Sequence[Row], title: str, unit: str) -> None:
    from matplotlib.ticker import NullLocator

    axis.set(title=title, xlabel="context, tokens", ylabel=unit)
    axis.set_xticks(sorted(_distinct(rows, "context")))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _logarithmic(axis: Axes) -> None:
    """From one sparse layer to a whole step there are orders of magnitude."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(xscale="log", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
