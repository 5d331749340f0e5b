"""Which methods are compared, as options of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tidaldecode.errors import InputError
from tidaldecode.methods.method import METHODS
from tidaldecode.options import Option, budgets, names, names_of
from tidaldecode.plan import Selection

if TYPE_CHECKING:  # they take seconds to import, and wrong options are told without them
    from transformers import PreTrainedConfig

    from tidaldecode.methods.method import Method
    from tidaldecode.plan import TidalPlan

Names = tuple[str, ...]


@dataclass(frozen=True)
class MethodOptions:
    """Methods, each with each of its settings.

    Raises:
        InputError: a budget is nobody's, or a method's is missing.
    """

    method: Annotated[
        Names, Option(f"Of {', '.join(METHODS)}. full always runs.", metavar="M,...", parse=names_of(*METHODS))
    ] = ("tidal",)
    budget: Annotated[
        tuple[int | float, ...] | None,
        Option("Tokens a layer reads, or fractions of the context. Default: plan's.", metavar="K,...", parse=budgets),
    ] = None
    plan: Annotated[
        Names,
        Option("Of tidal: plan files, 'auto', 'paper', shipped plans.", metavar="NAME|FILE,...", parse=names),
    ] = ("auto",)
    selection: Annotated[
        tuple[Selection, ...],
        Option(
            "Of oracle: whose scores choose, per_head or unified.",
            metavar="S,...",
            parse=names_of("per_head", "unified"),
        ),
    ] = ("per_head",)
    page_size: Annotated[int, Option("Of quest: tokens of a page.", metavar="N", min=1)] = 16
    full_layers: Annotated[
        int | None,
        Option("First layers that read everything. Default: 2 of quest, 0 of oracle.", metavar="N", min=0),
    ] = None

    def __post_init__(self) -> None:
        if self.method == ("full",) and self.budget is not None:
            raise InputError("--method full reads everything: leave out --budget")
        if self.budget is None and (unset := [name for name in self.method if name not in ("full", "tidal")]):
            raise InputError(f"--method {','.join(unset)} needs a --budget")

    @property
    def plans(self) -> Names:
        """The names of the plans that are needed."""
        return self.plan if "tidal" in self.method else ()

    def checked(self, config: PreTrainedConfig, context: int) -> tuple[Method, ...]:
        """The methods, for a model.

        Args:
            context: tokens that a fraction is one of.

        Raises:
            InputError: a setting is wrong, or as `check_methods`.
        """
        from tidaldecode.methods.method import check_methods, every_method

        choices: dict[str, Sequence[Any]] = {
            "plan": [named_plan(plan, config) for plan in self.plans],
            "selection": self.selection,
            "page_size": (self.page_size,),
        }
        if self.full_layers is not None:
            choices["full_layers"] = (self.full_layers,)
        methods = tuple(every_method(self.method, self.budget or (), **choices))
        check_methods(methods, config, context)
        return methods


def named_plan(name: str, config: PreTrainedConfig) -> TidalPlan:
    """The plan of a name or file, see `find_plan`; a plan without a name goes by its file's."""
    from tidaldecode.plans.find import find_plan

    plan = find_plan(name, config)
    return plan if plan.name is not None else plan.model_copy(update={"name": Path(name).stem})
