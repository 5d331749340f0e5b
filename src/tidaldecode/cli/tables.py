"""Tables of figures, and what stands below them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    names: bool = True,
    bold: int | None = None,
    least: int | None = None,
    **numbers: Any,
) -> None:
    """A table of numbers; nothing in it is read as markup.

    Args:
        names: whether the first column holds names.
        bold: number of a row that stands out.
        least: letters of a name that are not broken.
        numbers: of `add_column`, for the columns of numbers.
    """
    table = Table(title=Text(title))
    for number, column in enumerate(columns):
        is_name = names and number == 0
        table.add_column(column, **({"min_width": least} if is_name else {"justify": "right", **numbers}))
    for number, cells in enumerate(rows):
        table.add_row(*map(Text, cells), style="bold" if number == bold else None)
    console.print(table)


def print_sets(console: Console, sets: dict[str, float]) -> None:
    """A line below a table of budgets for each method whose KV heads read several sets."""
    for name, count in sets.items():
        line = (
            f"{name}: a budget is that of one set; each KV head reads {count:g} sets, so {count:g} times as many tokens"
        )
        console.print(Text(line), soft_wrap=True)
