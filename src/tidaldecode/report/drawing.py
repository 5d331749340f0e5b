"""How figures look: a colour for each method, and one drawing for PNG files and for pages in light and dark."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tidaldecode.errors import InputError
from tidaldecode.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 7.6, 3.7  # inches: a page on a desk, and on a phone

COLORS = {
    "ink": "#1c2430", "muted": "#5a6675", "grid": "#d6dce3", "paper": "#fefefe",
    "slate": "#5f6b7a", "silver": "#8893a2", "blue": "#0a6cc4", "teal": "#00857a", "orange": "#cc5500",
    "magenta": "#b0267e", "gold": "#8a6a00", "violet": "#7048d6", "green": "#4c8a1f", "red": "#b3372f",
    "brown": "#7a5238",
}  # fmt: skip
"""Of figures on a light page, by the names of their CSS variables."""

INK, MUTED, GRID, PAPER = (COLORS[name] for name in ("ink", "muted", "grid", "paper"))
_METHODS = {
    "full": "slate", "sdpa": "silver", "tidal": "blue", "tidal unified": "teal", "quest": "orange",
    "streaming": "magenta", "oracle": "gold",
}  # fmt: skip
_SPARE = ("teal", "violet", "green", "red", "brown")
_MARKERS = "os^DvPX*<>"

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED, "axes.grid": True, "axes.grid.axis": "y", "axes.labelcolor": MUTED, "axes.labelsize": 8.5,
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlecolor": INK, "axes.titlelocation": "left",
    "axes.titlesize": 9, "axes.axisbelow": True, "axes.linewidth": 0.7, "font.size": 9, "grid.color": GRID,
    "grid.linewidth": 0.7, "legend.fontsize": 8.5, "legend.frameon": False, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "svg.fonttype": "none", "svg.hashsalt": "tidaldecode", "text.color": INK,
    "text.parse_math": False, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "xtick.major.width": 0.7, "ytick.major.width": 0.0,
}  # fmt: skip

COLOR_MAP = "cividis"
"""Tells more from less for colour-blind readers too."""

Draw = Callable[[Any, float], "Figure | None"]
"""Draws rows, where there are any, as a figure so many inches wide; `None` where there is nothing to draw.

The first line of its docstring is the figure's title, the paragraph below it what the figure shows.
"""


class LineStyle(NamedTuple):
    """Of one line: colour and marker, so that neither is needed to tell it from the others."""

    color: str
    marker: str


def check_matplotlib() -> None:
    """Refuses to plot where there is nothing to plot with.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: pip install 'tidaldecode[plot]'")


def line_styles(methods: Sequence[str]) -> list[LineStyle]:
    """A style for each line by its method; the second line of a method takes a spare colour."""
    spare = [name for name in _SPARE if name not in {_METHODS.get(method) for method in methods}]
    names: list[str] = []
    for index, method in enumerate(methods):
        name = _METHODS.get(method)
        if name is None or name in names:
            name = spare.pop(0) if spare else _SPARE[index % len(_SPARE)]
        names.append(name)
    return [LineStyle(COLORS[name], _MARKERS[index % len(_MARKERS)]) for index, name in enumerate(names)]


class Line(NamedTuple):
    """A line of a panel.

    Attributes:
        errors: of the values, drawn as bars; `None` where they have none.
        more: what matplotlib is told beside.
    """

    label: str | None
    style: LineStyle
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float | None] | None = None
    more: Mapping[str, Any] = {}


def panels(width: float, height: float, count: int = 1, columns: int = 1, **subplots: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its axes, row by row, without those that the last row has too many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False, **subplots).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def line_panels(
    width: float, height: float, shown: Sequence[tuple[str, Sequence[Line]]], xlabel: str, ylabel: str,
    columns: int = 1, level: float | None = None, scales: Mapping[str, Any] | None = None, **subplots: Any,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """Titles with lines below them, and a legend of all lines.

    Args:
        width, height: inches, the height that of a row of panels, to which the legend comes.
        level: where full attention is, drawn as a dashed line.
        scales: what `Axes.set` is told before lines are drawn.
    """
    labels = {line.label for _, lines in shown for line in lines if line.label}
    legend = 0.18 * (-(-len(labels) // _legend_columns(labels, width)) + 1)
    figure, axes = panels(width, height * -(-len(shown) // columns) + legend, len(shown), columns, **subplots)
    for axis, (title, lines) in zip(axes, shown, strict=True):
        if level is not None:
            axis.axhline(level, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, label="full attention")
        axis.set(**scales or {})
        axis.set_title(title, fontsize=9 if columns < 3 else 7.5)
        for label, style, xs, ys, errors, more in lines:
            look = {"color": style.color, "marker": style.marker, "label": label} | dict(more)
            if errors is None:
                axis.plot(xs, ys, **look)
            else:
                axis.errorbar(xs, ys, [error or 0.0 for error in errors], capsize=2.5, elinewidth=1, **look)
    label_panels(axes, columns, xlabel, ylabel)
    add_legend(figure, width)
    return figure, axes


def set_ticks(axis: Axes, ticks: Mapping[float, str]) -> None:
    """Marks these places of the x axis, and no others."""
    from matplotlib.ticker import NullLocator

    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(list(ticks), list(ticks.values()), color=INK)


def label_panels(axes: Sequence[Axes], columns: int, xlabel: str, ylabel: str) -> None:
    """Labels the lowest panel of each column and the first of each row."""
    for index, axis in enumerate(axes):
        if index + columns >= len(axes):
            axis.tick_params(labelbottom=True)
            axis.set_xlabel(xlabel)
        if index % columns == 0:
            axis.set_ylabel(ylabel)


def add_legend(figure: Figure, width: float) -> None:
    """A legend of all lines below the axes, in as many columns as fit, each line once."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = _legend_columns(entries, width)
    figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns)


def _legend_columns(labels: Collection[str], width: float) -> int:
    widest = max(map(len, labels), default=0) * 0.075 + 0.55  # inches, about
    return max(1, min(4, int(width / widest)))


def save_png(draw: Draw, rows: Any, path: Path, title: str) -> bool:
    """Writes a PNG file; an existing file stays whole until the new one is complete.

    Returns:
        Whether there was anything to draw: else there is no file.

    Raises:
        InputError: it can't be written.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = draw(rows, WIDE) if rows else None
        if figure is not None:
            figure.suptitle(title, fontsize=10)
            with whole_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=160)
    return figure is not None


def to_svg(draw: Draw, rows: Any, width: float, name: str) -> str:
    """The figure as an `<svg>` element to put into a page, which says what the colours are; "" of nothing to draw.

    Colours become the CSS variables of `palette`, text takes the page's font, and all ids begin with the name.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's fonts have more than those that measure here
        figure, buffer = draw(rows, width) if rows else None, io.StringIO()
        if figure is None:
            return ""
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for variable, color in COLORS.items():
        svg = re.sub(rf"(?<=[:\s]){color}\b", f"var(--{variable})", svg)
    return svg.strip()
