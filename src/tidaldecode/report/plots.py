"""Figures of measured times, from the JSON of `bench ops` and `bench decode`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.report.drawing import INK, LineStyle, add_legend, line_styles, new_figure, save_png
from tidaldecode.report.labels import budget_label, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

_LAYER_OPERATIONS = ("sdpa", "flashinfer", "full", "select", "sparse")


def plot_operations(results: dict[str, Any], path: Path) -> None:
    """Writes `operations` as a PNG file.

    Args:
        results: the JSON of `bench ops`.
        path: the PNG file.
    """
    save_png(partial(operations, results), path, f"{results['device']}, {results['dtype']}")


def plot_decode(results: dict[str, Any], path: Path) -> None:
    """Writes `decode_steps` as a PNG file.

    Args:
        results: the JSON of `bench decode`.
        path: the PNG file.
    """
    title = f"{results['model']}, batch {results['batch']}: {results['device']}, {results['dtype']}"
    save_png(partial(decode_steps, results["rows"]), path, title)


def operations(results: dict[str, Any], width: float) -> Figure:
    """Time of a decode step's attention (above) and of one layer's operations (below) against the context.

    Args:
        results: the JSON of `bench ops`; one column of figures for each number of KV heads.
        width: inches of a column.
    """
    rows: list[Row] = results["rows"]
    kv_heads = sorted(_distinct(rows, "kv_heads"))
    figure = new_figure(width * len(kv_heads), 9)
    axes = figure.subplots(2, len(kv_heads), squeeze=False)
    for column, heads in enumerate(kv_heads):
        own = [row for row in rows if row["kv_heads"] == heads]
        shape = f"{own[0]['heads']} query heads, {heads} KV heads, batch {own[0]['batch']}"
        panels = {f"attention of a step of {results['layers']} layers": ("step",), "one layer": _LAYER_OPERATIONS}
        for axis, (title, names) in zip(axes[:, column], panels.items(), strict=True):
            shown = [row for row in own if row["operation"].split()[0] in names]
            _operation_lines(axis, shown)
            _logarithmic(axis)
            _contexts(axis, shown)
            axis.set(title=f"{shape}: {title}", ylabel="µs")
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def decode_steps(rows: Sequence[Row], width: float) -> Figure:
    """Milliseconds per token against the context, a line for each method and budget, its floor dashed.

    Args:
        rows: of `bench decode`.
        width: inches.
    """
    figure = new_figure(width, 3.6 if width > 5 else 3.9)
    axis = figure.subplots()
    lines = list(dict.fromkeys((row["method"], row["budget"]) for row in rows))
    styles = line_styles([method for method, _ in lines])
    for (method, budget), style in zip(lines, styles, strict=True):
        points = _by_context(row for row in rows if (row["method"], row["budget"]) == (method, budget))
        contexts = [row["context"] for row in points]
        axis.plot(
            contexts, [row["step_ms"] for row in points], color=style.color, marker=style.marker,
            label=_line_label(method, budget),
        )  # fmt: skip
        axis.plot(contexts, [row["floor_ms"] for row in points], color=style.color, linestyle="--", linewidth=1)
    _contexts(axis, rows)
    axis.set(ylabel="ms per token; dashed: floor", ylim=(0, None))
    add_legend(figure, width)
    return figure


def step_bars(rows: Sequence[Row], width: float) -> Figure:
    """Time of the attention of a decode step, a bar for each method and budget, a panel for each shape.

    Args:
        rows: of `bench ops`; those of whole steps are shown.
        width: inches.
    """
    steps = [row for row in rows if row["operation"].startswith("step ")]
    shapes = list(dict.fromkeys((row["kv_heads"], row["batch"], row["context"]) for row in steps))
    columns = min(len(shapes), 2 if width > 5 else 1)
    lines = len(shapes) // columns + bool(len(shapes) % columns)
    most = max(sum(_shape(row) == shape for row in steps) for shape in shapes)
    figure = new_figure(width, lines * (0.19 * most + 0.45))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, shape in zip(axes, shapes, strict=False):
        _bars(axis, [row for row in steps if _shape(row) == shape])
        kv_heads, batch, context = shape
        axis.set_title(f"{context:,} tokens, {kv_heads} KV heads" + (f", batch {batch}" if batch > 1 else ""))
    for axis in axes[len(shapes) :]:
        axis.set_visible(False)
    return figure


def _bars(axis: Axes, rows: Sequence[Row]) -> None:
    names = [row["operation"].removeprefix("step ") for row in rows]
    labels = [_line_label(name, row["budget"]) for name, row in zip(names, rows, strict=True)]
    times = [row["us"] / 1000 for row in rows]
    colors = {name: _bar_style(name).color for name in names}
    axis.barh(range(len(rows)), times, color=[colors[name] for name in names], height=0.7)
    for index, (row, time) in enumerate(zip(rows, times, strict=True)):
        speed_up = row["speedup_vs_full"]
        text = f"{time:,.2f} ms" + ("" if speed_up is None else f" · {ratio(speed_up)}")
        axis.annotate(text, (time, index), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK)
    axis.set_yticks(range(len(rows)), labels, fontsize=7.5, color=INK)
    axis.set_xlim(0, max(times) * 1.45)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


def _bar_style(name: str) -> LineStyle:
    return line_styles(["sdpa" if "sdpa" in name else name])[0]


def _shape(row: Row) -> tuple[int, int, int]:
    return row["kv_heads"], row["batch"], row["context"]


def _operation_lines(axis: Axes, rows: Sequence[Row]) -> None:
    """A line for each operation and budget: a colour for the one, a marker for the other."""
    names, budgets = _distinct(rows, "operation"), _distinct(rows, "budget")
    for name in names:
        for budget in budgets:
            points = _by_context(row for row in rows if (row["operation"], row["budget"]) == (name, budget))
            if points:
                axis.plot(
                    [row["context"] for row in points],
                    [row["us"] for row in points],
                    color=f"C{names.index(name)}",
                    marker="o^sDvPX*"[budgets.index(budget) % 8],
                    label=_line_label(name, budget),
                )


def _by_context(rows: Any) -> list[Row]:
    return sorted(rows, key=lambda row: row["context"])


def _line_label(name: str, budget: int | float | None) -> str:
    return name if budget is None else f"{name}, {budget_label(budget)}"


def _distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """The values of a key in the order in which they were measured."""
    return list(dict.fromkeys(row[key] for row in rows))


def _contexts(axis: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set(xlabel="context, tokens", xticks=sorted(_distinct(rows, "context")))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())


def _logarithmic(axis: Axes) -> None:
    """From one sparse layer to a whole step there are orders of magnitude."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(xscale="log", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_locator(NullLocator())
