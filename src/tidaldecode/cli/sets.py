"""What a budget makes where the query heads of one KV head read sets of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from tidaldecode.methods.method import Method
    from tidaldecode.plan import ModelShape


def sets_per_kv_head(methods: Iterable[Method], shape: ModelShape) -> dict[str, float]:
    """Sets of tokens that the query heads of one KV head read in a sparse layer, by what reads more than one."""
    sets = {}
    for method in methods:
        if (count := method.sets_per_kv_head(shape)) > 1:
            what = method.plan.name or "plan" if method.plan is not None else method.selection.replace("_", " ")
            sets[f"{method.name}, {what}"] = round(count, 4)
    return sets


def print_sets(console: Console, sets: dict[str, float]) -> None:
    """A line below a table of budgets for each method whose KV heads read several sets."""
    for name, count in sets.items():
        line = (
            f"{name}: a budget is that of one set; each KV head reads {count:g} sets, so {count:g} times as many tokens"
        )
        console.print(Text(line), soft_wrap=True)
