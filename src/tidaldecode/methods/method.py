"""The methods that are compared, each with its settings: what makes the attention of a decode step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from tidaldecode.errors import InputError
from tidaldecode.methods.names import METHODS
from tidaldecode.methods.oracle import OracleAttention
from tidaldecode.methods.quest import QuestAttention
from tidaldecode.methods.streaming import StreamingAttention
from tidaldecode.methods.tidal import Attention, DecodeAttention
from tidaldecode.models import check_architecture, check_plan, model_shape, sliding_windows
from tidaldecode.plan import ModelShape, Selection, TidalPlan, tokens_of

BUDGETED = METHODS[1:]
"""The methods that read a token budget."""

METHOD_KEY = ("method", "plan", "plan_digest", "budget", "selection", "page_size", "full_layers")
"""Fields of a row of results that tell one method, with its settings, from another: see `Method.key`."""


@dataclass(frozen=True)
class Method:
    """One method with the settings that it has.

    Attributes:
        name: one of `METHODS`.
        budget: tokens that a layer reads, or a fraction of the context, which every method rounds up to whole tokens
            in the same way; `None` for full attention, and for a plan that keeps its own (a fraction is rounded as if
            it were given here).
        plan: of `tidal`.
        selection: of `oracle`: whose scores choose.
        page_size: of `quest`: tokens of a page, a power of two.
        full_layers: of `quest` and `oracle`: how many of the first layers read everything. Default: 2 of `quest`, as in
            its paper, none of `oracle`.

    Raises:
        InputError: the name is unknown, or a setting is missing or wrong.
    """

    name: str
    budget: int | float | None = None
    plan: TidalPlan | None = None
    selection: Selection = "per_head"
    page_size: int = 16
    full_layers: int | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise InputError(f"method {self.name!r} is unknown: give one of {', '.join(METHODS)}")
        if self.name == "tidal" and self.plan is None:
            raise InputError("method 'tidal' needs a plan")
        if self.name == "full" and self.budget is not None:
            raise InputError("method 'full' reads everything: leave out the budget")
        if self.name in BUDGETED and self.token_budget is None:
            raise InputError(f"method {self.name!r} needs a budget")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise InputError(f"page size {self.page_size} is no power of two")
        if isinstance(self.budget, int):
            self._check_tokens(self.budget)
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise InputError(f"budget {self.budget}: a fraction of the context lies in (0, 1]")

    @property
    def token_budget(self) -> int | float | None:
        """The budget, or the plan's own where none is given."""
        return self.plan.token_budget if self.budget is None and self.plan is not None else self.budget

    @property
    def least_tokens(self) -> int:
        """The smallest budget: the new token and a chosen one, of Quest as pages."""
        return 2 * self.page_size if self.name == "quest" else 2

    @property
    def _full_layers(self) -> int:
        """Leading full layers; none of a method that has no such setting."""
        if self.full_layers is not None and self.name in ("quest", "oracle"):
            return self.full_layers
        return 2 if self.name == "quest" else 0

    @property
    def label(self) -> str:
        """The method in a few words, for tables and figures."""
        kind = {"tidal": self.plan and (self.plan.name or "plan"), "oracle": self.selection}.get(self.name)
        return " ".join(str(word) for word in (self.name, kind, self.token_budget) if word is not None)

    def key(self) -> dict[str, str | int | float | None]:
        """`METHOD_KEY` of the method's rows of results; `None` where a setting is not the method's.

        `plan_digest` tells plans of one name apart, whatever budget they are given.
        """
        quest = self.name == "quest"
        values = (
            self.name,
            None if self.plan is None else self.plan.name or "plan",
            None if self.plan is None else _digest(self.plan),
            self.token_budget,
            self.selection if self.name == "oracle" else None,
            self.page_size if quest else None,
            self._full_layers if quest else self._full_layers or None,
        )
        return dict(zip(METHOD_KEY, values, strict=True))

    def attention(self, shape: ModelShape, context: int) -> Attention:
        """The attention of the method's decode steps.

        Args:
            shape: heads and layers of a model that attends to the whole context in all of them.
            context: tokens that a fraction is one of.

        Raises:
            InputError: the budget is too small: for two pages, or for more than a plan's sinks and recent tokens.
        """
        if self.token_budget is None:
            return DecodeAttention(TidalPlan.full(shape.num_layers), shape)
        tokens = tokens_of(self.token_budget, context)
        self._check_tokens(tokens)
        if self.plan is not None:
            return DecodeAttention(self.plan.with_budget(tokens), shape)
        if self.name == "quest":
            return QuestAttention(shape, tokens, range(self._full_layers), self.page_size)
        if self.name == "streaming":
            return StreamingAttention(shape, tokens)
        return OracleAttention(shape, tokens, self.selection, self._full_layers)

    def sets_per_kv_head(self, shape: ModelShape) -> float:
        """Sets of tokens, each of the budget, that the query heads of one KV head read in a sparse layer."""
        if self.plan is not None:
            return self.plan.sets_per_kv_head(shape)
        return shape.sets_per_kv_head(self.selection) if self.name == "oracle" else 1.0

    def _check_tokens(self, tokens: int) -> None:
        if tokens >= self.least_tokens:
            return
        what = f"two pages of {self.page_size}" if self.name == "quest" else "the new token and a chosen one"
        raise InputError(f"{self.name}: budget {tokens} is too small: {what} make {self.least_tokens}")


def every_method(
    names: Sequence[str],
    budgets: Sequence[int | float],
    plans: Sequence[TidalPlan],
    selections: Sequence[Selection] = ("per_head",),
    page_size: int = 16,
    full_layers: int | None = None,
) -> Iterator[Method]:
    """Each method with each of its settings, in the order given.

    Args:
        names: of `METHODS`.
        budgets: of all methods but `full`; none: each plan keeps its own.
        plans: of `tidal`.
        selections: of `oracle`.
        page_size: of `quest`.
        full_layers: of `quest` and `oracle`.

    Raises:
        InputError: a name is unknown, or a setting is missing or wrong.
    """
    for name in names:
        for budget in (budgets or (None,)) if name != "full" else (None,):
            if name == "tidal":
                yield from (Method(name, budget, plan) for plan in plans)
            elif name == "oracle":
                yield from (
                    Method(name, budget, selection=selection, full_layers=full_layers) for selection in selections
                )
            elif name == "quest":
                yield Method(name, budget, page_size=page_size, full_layers=full_layers)
            else:
                yield Method(name, budget)


def with_full(methods: Sequence[Method]) -> tuple[Method, ...]:
    """Full attention, then each of the others once."""
    return tuple({tuple(method.key().values()): method for method in (Method("full"), *methods)}.values())


def check_methods(methods: Sequence[Method], config: PreTrainedConfig, context: int) -> None:
    """Refuses what would fail on a model only after it was loaded.

    Args:
        methods: to be compared.
        config: the model's configuration.
        context: tokens that a fraction is one of.

    Raises:
        InputError: the architecture is not supported or has layers with a sliding window, a plan was made for another
            model, two plans have one name, or a budget is too small for a plan.
    """
    check_architecture(config)
    if any(window is not None for window in sliding_windows(config)):
        raise InputError(
            f"{config.model_type!r} has layers with a sliding window, whose cache can't go back to a prompt: "
            "methods are compared on models without"
        )
    for method in methods:
        if method.plan is not None:
            check_plan(method.plan, config)
        method.attention(model_shape(config), context)
    check_plan_names(method.key() for method in methods)


def check_plan_names(rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuses rows of results, or keys of methods, in which one name stands for two plans.

    Raises:
        InputError: it does.
    """
    digests: dict[str | None, str | None] = {}
    for row in rows:
        if digests.setdefault(row["plan"], row["plan_digest"]) != row["plan_digest"]:
            raise InputError(f"two plans are named {row['plan']!r}, and their results would be mixed: rename one")


def _digest(plan: TidalPlan) -> str:
    """Of everything that decides what a plan reads, but its budget."""
    left_out = {"name", "origin", "calibration", "model", "token_budget"}
    if plan.drafting == "plan":  # results that are older than the choice keep their digests
        left_out.add("drafting")
    rules = plan.model_dump_json(exclude=left_out)
    return hashlib.sha256(rules.encode()).hexdigest()[:12]
