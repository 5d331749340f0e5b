"""What `bench ops`, `bench decode` and `bench generate` measure. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tidaldecode.bench.shapes import RandomModel
from tidaldecode.errors import InputError
from tidaldecode.methods.method import METHODS
from tidaldecode.models import ModelFiles, find_model
from tidaldecode.options import Option, PlanName, Seed, TrustRemoteCode, budgets, integers, names, names_of
from tidaldecode.plan import TidalPlan
from tidaldecode.texts.text import TextSource

TIMED_METHODS = ("full", "sdpa", *(name for name in METHODS if name not in ("full", "oracle")))
"""`full` is full attention by this package's kernel, `sdpa` by PyTorch's; the oracle saves no time."""

WHOLE_RUN_METHODS = (
    "full",
    "tidal",
    "lossless",
    "quest",
    "streaming",
    "transformers",
    "transformers-static",
)
"""Ways to generate in `bench generate`; the last two are Transformers' own."""

WARM_UP, REPEATS = 5, 2
"""Steps before each repeat, and repeats, of `bench decode`."""

_DEFAULT_CONFIG = "llama-3-8b"

_Contexts = Annotated[tuple[int, ...], Option("Tokens in the KV cache.", metavar="N,...", parse=integers)]
_Budgets = Annotated[
    tuple[int | float, ...],
    Option("Tokens a sparse layer reads, or fractions of the context.", metavar="K,...", parse=budgets),
]
_Batch = Annotated[int, Option("Sequences decoded at once.", min=1)]


@dataclass(frozen=True)
class OperationsSettings:
    """What to measure: every operation at each number of KV heads, context and budget.

    Raises:
        InputError: names the first wrong setting.
    """

    heads: Annotated[int, Option("Query heads.", min=1)] = 32
    kv_heads: Annotated[tuple[int, ...], Option("KV heads.", metavar="N,...", parse=integers)] = (8, 32)
    head_dim: Annotated[int, Option("Head dim.", min=1)] = 128
    contexts: _Contexts = (10240, 32768, 102400)
    budgets: _Budgets = (1024, 4096)
    batch: _Batch = 1
    layers: Annotated[int, Option("Layers of a decode step.", min=3)] = 32
    seed: Seed = 0

    def __post_init__(self) -> None:
        for kv_heads in self.kv_heads:
            if self.heads % kv_heads:
                raise InputError(f"{self.heads} query heads are no multiple of {kv_heads} KV heads")
        for budget in self.budgets:
            TidalPlan.paper(self.layers, token_budget=budget)


@dataclass(frozen=True)
class DecodeSettings:
    """What to measure: each method at each context, those with a budget at each budget."""

    contexts: _Contexts = (10240, 32768, 102400)
    budgets: _Budgets = (1024,)
    methods: Annotated[tuple[str, ...], Option("What to compare.", metavar="M,...", parse=names_of(*TIMED_METHODS))] = (
        TIMED_METHODS
    )
    plan: PlanName = "paper"
    batch: _Batch = 1
    steps: Annotated[int, Option("Decode steps of each of two repeats.", min=1)] = 50
    seed: Seed = 0

    @property
    def capacity(self) -> int:
        """Tokens that the cache must hold."""
        return max(self.contexts) + REPEATS * (WARM_UP + self.steps)

    def runs(self) -> Iterator[tuple[str, int | float | None]]:
        """Each method with each of its budgets."""
        for method in self.methods:
            for budget in self.budgets if method not in ("full", "sdpa") else (None,):
                yield method, budget


def _lengths(option: str, text: str) -> tuple[int | Literal["auto"], ...]:
    return tuple("auto" if item == "auto" else integers(option, item)[0] for item in text.split(","))


@dataclass(frozen=True)
class WholeRunSettings:
    """What to generate: behind prompts of each context, in batches of each size, in each way.

    Raises:
        InputError: a method wants a budget, or a budget is nobody's.
    """

    contexts: Annotated[tuple[int, ...], Option("Tokens of a prompt.", metavar="N,...", parse=integers)] = (4096,)
    batches: Annotated[tuple[int, ...], Option("Prompts at once.", metavar="N,...", parse=integers)] = (1,)
    new_tokens: Annotated[int, Option("Tokens to generate behind each prompt.", min=2)] = 128
    methods: Annotated[
        tuple[str, ...] | None,
        Option(
            "Of full, tidal, lossless, quest, streaming, transformers, transformers-static (Transformers' own). "
            "Default: all but quest and streaming, and on a CPU but transformers-static.",
            metavar="M,...",
            parse=names_of(*WHOLE_RUN_METHODS),
        ),
    ] = None
    plan: Annotated[
        tuple[str, ...], Option("Plan files, 'auto', 'paper', shipped plans.", metavar="NAME|FILE,...", parse=names)
    ] = ("auto",)
    budgets: Annotated[
        tuple[int | float, ...] | None,
        Option("Tokens a layer reads, or fractions of the context. Default: plan's.", metavar="K,...", parse=budgets),
    ] = None
    lossless: Annotated[
        tuple[int | Literal["auto"], ...],
        Option("Of lossless: tokens to draft in a round.", metavar="T|auto,...", parse=_lengths),
    ] = ("auto",)

    def __post_init__(self) -> None:
        if self.budgets is None and (unset := {"quest", "streaming"} & set(self.methods or ())):
            raise InputError(f"--methods {','.join(sorted(unset))} needs --budgets")
        if self.budgets is not None and not set(self.methods or ("tidal",)) - {"full", *WHOLE_RUN_METHODS[-2:]}:
            raise InputError(f"--methods {','.join(self.methods or ())} reads everything: leave out --budgets")

    @property
    def plans(self) -> tuple[str, ...]:
        """The names of the plans that are needed."""
        return self.plan if self.methods is None or {"tidal", "lossless"} & set(self.methods) else ()

    def methods_on(self, device_type: str) -> tuple[str, ...]:
        """The methods; by default those that a user of such a device would compare."""
        static = ("transformers-static",) if device_type == "cuda" else ()
        return self.methods or ("full", "tidal", "lossless", "transformers", *static)


@dataclass(frozen=True)
class SourceOptions:
    """Whose decode steps are timed: a shape's, with random weights, or a model's.

    Raises:
        InputError: both are given, there is no such shape, or a text that nothing would read.
    """

    config: Annotated[str | None, Option("A public model's shape, with random weights. Default: llama-3-8b.")] = None
    model: Annotated[str | None, Option("A model with its weights instead.", metavar="NAME|PATH")] = None
    trust_remote_code: TrustRemoteCode = False
    kv: Annotated[
        Literal["text", "random"] | None,
        Option("K and V to decode behind. Default: the text's of a --model, random ones of a --config."),
    ] = None
    text: TextSource = field(default_factory=TextSource)

    def __post_init__(self) -> None:
        if self.model is None:
            self.find()
            if self.kv == "text" or self.text.text is not None:
                raise InputError("--config has random weights, which read no text: give a --model, or leave it out")
        elif self.config is not None:
            raise InputError("give either --config or --model, not both")
        if self.kv == "random" and self.text.text is not None:
            raise InputError("--kv random reads no text: leave out --text")

    @property
    def parts(self) -> Iterator[str] | None:
        """The text to be read, in parts; `None` for random K and V.

        Raises:
            InputError: it is missing.
        """
        return None if self.model is None or self.kv == "random" else self.text.parts()

    def find(self) -> RandomModel | ModelFiles:
        """The shape or the model; nothing is loaded.

        Raises:
            InputError: there is no such model.
        """
        if self.model is None:
            return RandomModel(self.config or _DEFAULT_CONFIG)
        return find_model(self.model, trust_remote_code=self.trust_remote_code)
