"""What a budget makes where the query heads of one KV head read sets of their own."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def print_sets(console: Console, sets: dict[str, float]) -> None:
    """A line below a table of budgets for each method whose KV heads read several sets."""
    for name, count in sets.items():
        line = (
            f"{name}: a budget is that of one set; each KV head reads {count:g} sets, so {count:g} times as many tokens"
        )
        console.print(Text(line), soft_wrap=True)
