"""The methods that are compared, by name: each a class of settings that makes the attention of a decode step.

A new method is a subclass of `Method` in a file of its own: to define it registers it, and commands list it by its name
as soon as its module stands in `METHODS` (what is there is known without PyTorch). See `docs/adding-a-method.md`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from tidaldecode.errors import InputError
from tidaldecode.models import check_architecture, model_shape, sliding_windows
from tidaldecode.plan import ModelShape, TidalPlan, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tidaldecode.methods.protocol import Attention

METHODS = {name: f"tidaldecode.methods.{name}" for name in ("full", "tidal", "quest", "streaming", "oracle")}
"""Names of the methods, and the modules that define them."""

METHOD_KEY = ("method", "plan", "plan_digest", "budget", "selection", "page_size", "full_layers")
"""Fields of a row of results that tell one method, with its settings, from another: see `Method.key`."""


@dataclass(frozen=True)
class Method:
    """One method with the settings that it has; a subclass adds its own as fields.

    Attributes:
        name: of the method.
        budget: tokens that a layer reads, or a fraction of the context, which every method rounds up to whole tokens
            in the same way.

    Raises:
        InputError: a setting is missing or wrong.
    """

    name: ClassVar[str]
    budget: int | float | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        METHODS.setdefault(cls.name, cls.__module__)

    def __post_init__(self) -> None:
        if self.token_budget is None:
            raise InputError(f"method {self.name!r} needs a budget")
        if isinstance(self.budget, int):
            self._check_tokens(self.budget)
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise InputError(f"budget {self.budget}: a fraction of the context lies in (0, 1]")

    @staticmethod
    def named(name: str, budget: int | float | None = None, plan: TidalPlan | None = None, **settings: Any) -> Method:
        """The method of a name, with those of the settings that it has and that are not `None`.

        Raises:
            InputError: the name is unknown, or a setting is missing or wrong.
        """
        kind = method_class(name)
        given = {"plan": plan, **settings}
        return kind(budget, **{key: value for key in _own(kind) if (value := given.get(key)) is not None})

    @property
    def token_budget(self) -> int | float | None:
        """The budget; `None` of a method that reads everything."""
        return self.budget

    @property
    def least(self) -> tuple[int, str]:
        """The smallest budget in tokens, and what it is made of."""
        return 2, "the new token and a chosen one"

    @property
    def kind(self) -> str | None:
        """What tells the method from others of its name, budgets aside."""
        return None

    @property
    def label(self) -> str:
        """The method in a few words, for tables and figures."""
        return " ".join(str(word) for word in (self.name, self.kind, self.token_budget) if word is not None)

    def settings(self) -> dict[str, str | int | None]:
        """The fields of `METHOD_KEY` that are the method's own."""
        return {}

    def key(self) -> dict[str, str | int | float | None]:
        """`METHOD_KEY` of the method's rows of results; `None` where a setting is not the method's."""
        return dict.fromkeys(METHOD_KEY) | {"method": self.name, "budget": self.token_budget} | self.settings()

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses a model that the method was not made for.

        Raises:
            InputError: it was not.
        """

    def whole_tokens(self, context: int) -> int | None:
        """The budget in tokens at a context; where a fraction of a short one is too little, as many as are needed."""
        budget = self.token_budget
        return max(tokens_of(budget, context), self.least[0]) if isinstance(budget, float) else budget

    def attention(self, shape: ModelShape, context: int) -> Attention:
        """The attention of the method's decode steps.

        Args:
            shape: heads and layers of a model that attends to the whole context in all of them.
            context: tokens that a fraction is one of.

        Raises:
            InputError: the budget is too small: for two pages, or for more than a plan's sinks and recent tokens.
        """
        assert self.token_budget is not None
        tokens = tokens_of(self.token_budget, context)
        self._check_tokens(tokens)
        return self.reading(shape, tokens)

    def reading(self, shape: ModelShape, tokens: int) -> Attention:
        """The attention of steps that read so many tokens in a layer."""
        raise NotImplementedError

    def sets_per_kv_head(self, shape: ModelShape) -> float:
        """Sets of tokens, each of the budget, that the query heads of one KV head read in a sparse layer."""
        return 1.0

    def _check_tokens(self, tokens: int) -> None:
        least, what = self.least
        if tokens < least:
            raise InputError(f"{self.name}: budget {tokens} is too small: {what} make {least}")


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        InputError: the name is unknown.
    """
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown: give one of {', '.join(METHODS)}")
    found = vars(import_module(METHODS[name])).values()
    return next(kind for kind in found if isinstance(kind, type) and getattr(kind, "name", None) == name)


def every_method(
    names: Iterable[str], budgets: Sequence[int | float] = (), **choices: Sequence[Any]
) -> Iterator[Method]:
    """Each method with each of its settings, in the order given.

    Args:
        names: of `METHODS`.
        budgets: of all methods that have one; none: each plan keeps its own.
        choices: values of settings, by name: `plan=plans, page_size=(16,)`. Each method takes those that it has.

    Raises:
        InputError: a name is unknown, or a setting is missing or wrong.
    """
    for kind in map(method_class, names):
        own = [name for name in _own(kind) if name in choices]
        for budget in (budgets or (None,)) if kind.name != "full" else (None,):
            for values in itertools.product(*(choices[name] for name in own)):
                yield kind(budget, **dict(zip(own, values, strict=True)))


def _own(kind: type[Method]) -> list[str]:
    """The settings that a method has beside its budget."""
    return [field.name for field in fields(kind)[1:]]


def with_full(methods: Sequence[Method]) -> tuple[Method, ...]:
    """Full attention, then each of the others once."""
    return tuple({tuple(method.key().values()): method for method in (Method.named("full"), *methods)}.values())


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
        method.check(config)
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
