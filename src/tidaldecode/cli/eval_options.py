"""Options that the commands of `tidaldecode eval` share, and the methods that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tidaldecode.cli import options
from tidaldecode.errors import InputError
from tidaldecode.methods.names import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tidaldecode.cli.outline import Outline
    from tidaldecode.methods.method import Method
    from tidaldecode.plan import TidalPlan

Methods = Annotated[
    str, typer.Option("--method", metavar="M,...", help="Of full, tidal, quest, streaming, oracle. full always runs.")
]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="K,...", help="Tokens a layer reads, or fractions of the context. Default: plan's."
    ),
]
Plans = Annotated[
    str, typer.Option("--plan", metavar="NAME|FILE,...", help="Of tidal: plan files, 'auto', 'paper', shipped plans.")
]
Selections = Annotated[
    str, typer.Option("--selection", metavar="S,...", help="Of oracle: whose scores choose, per_head or unified.")
]
PageSize = Annotated[int, typer.Option("--page-size", metavar="N", min=1, help="Of quest: tokens of a page.")]
FullLayers = Annotated[
    int | None,
    typer.Option(
        "--full-layers", metavar="N", min=0, help="First layers that read everything. Default: 2 of quest, 0 of oracle."
    ),
]
Output = Annotated[
    str | None, typer.Option("--output", metavar="DIR", help="Folder of results; a stopped run goes on from there.")
]


def check_names(methods: str, budgets: str | None, plans: str, outline: Outline) -> None:
    """Refuses, before anything is loaded, names and budgets that are wrong or are nobody's, and plans of other models.

    Raises:
        InputError: they are.
    """
    names = options.parse_names("--method", methods, METHODS)
    if names == ("full",) and budgets is not None:
        raise InputError("--method full reads everything: leave out --budget")
    if budgets is None and (unset := [name for name in names if name not in ("full", "tidal")]):
        raise InputError(f"--method {','.join(unset)} needs a --budget")
    if budgets is not None:
        options.parse_budgets(budgets, "--budget")
    if "tidal" in names:
        for plan in _items(plans):
            outline.check_plan(plan)


def make_methods(
    config: PreTrainedConfig,
    methods: str,
    budgets: str | None,
    plans: str,
    selections: str,
    page_size: int,
    full_layers: int | None,
) -> tuple[Method, ...]:
    """The methods that the options name, for a model.

    Raises:
        InputError: a name is unknown, or a setting is missing or wrong.
    """
    from tidaldecode.methods.method import every_method
    from tidaldecode.plans.find import find_plan

    names = options.parse_names("--method", methods, METHODS)
    return tuple(
        every_method(
            names,
            () if budgets is None else options.parse_budgets(budgets, "--budget"),
            [_named(find_plan(plan, config), plan) for plan in _items(plans)] if "tidal" in names else [],
            options.parse_names("--selection", selections, ("per_head", "unified")),
            page_size,
            full_layers,
        )
    )


def _named(plan: TidalPlan, name: str) -> TidalPlan:
    """A plan without a name goes by its file's."""
    return plan if plan.name is not None else plan.model_copy(update={"name": Path(name).stem})


def _items(text: str) -> Sequence[str]:
    return tuple(dict.fromkeys(item.strip() for item in text.split(",")))


def results_file(output: str | None, name: str, option: str = "--output") -> Path | None:
    """The results file in the folder of an option, which need not exist.

    Raises:
        InputError: the name is a file's.
    """
    if output is None:
        return None
    if Path(output).exists() and not Path(output).is_dir():
        raise InputError(f"{option} {output} is a file: give a folder")
    return Path(output) / name


class OnProgress(Protocol):
    """Told how many parts of how many are done, and in words what comes next."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


@contextmanager
def progress_bar(console: Console) -> Iterator[OnProgress]:
    """A bar with the time left, on a terminal; it goes away when it is done."""
    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, speed_estimate_period=3600) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield show
