"""How a prompt is answered. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tidaldecode.errors import InputError
from tidaldecode.options import Option, PlanName, Seed
from tidaldecode.options import budget as one_budget

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tidaldecode.plan import TidalPlan


def _draft_length(option: str, text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} {text!r}: give the tokens to draft in a round, at least 1, or auto")
    return int(text)


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken: greedily at temperature 0, else sampled from the `top_p` nucleus.

    Raises:
        InputError: nothing can be sampled so, or greedy decoding got a nucleus.
    """

    temperature: Annotated[float, Option("0 decodes greedily.", min=0)] = 0.0
    top_p: Annotated[float, Option("Nucleus to sample from.", min=0, max=1)] = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:
            raise InputError(
                f"--temperature {self.temperature} is too small to sample with: give 0 for greedy decoding"
            )
        if self.top_p == 0:
            raise InputError("--top-p must be above 0")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError("--top-p samples, and greedy decoding does not: give a --temperature above 0")

    def options(self) -> dict[str, Any]:
        """The same, as `generate` of Transformers takes it."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Passes:
    """How full attention looks over the plan's shoulder: by lossless rounds, by correction, or not at all.

    Attributes:
        lossless: tokens drafted in a round, or `auto`.
        correction_interval: decoded tokens after which they run again.

    Raises:
        InputError: both are asked for, or an interval of no tokens.
    """

    lossless: Annotated[
        int | Literal["auto"] | None,
        Option(
            "Draft T tokens by the plan, verify: the text is full attention's. auto: as many as pay, or none.",
            metavar="T|auto",
            parse=_draft_length,
        ),
    ] = None
    correction_interval: Annotated[
        int | None, Option("Run every T new tokens again with full attention.", metavar="T")
    ] = None

    def __post_init__(self) -> None:
        if self.correction_interval is None:
            return
        if self.correction_interval < 1:
            raise InputError(f"--correction-interval {self.correction_interval} must be at least 1 token")
        if self.lossless is not None:
            raise InputError("--lossless corrects the cache in each round: leave out --correction-interval")

    @property
    def asked(self) -> list[str]:
        """The options of those that were asked for."""
        given = {"--lossless": self.lossless, "--correction-interval": self.correction_interval}
        return [option for option, value in given.items() if value is not None]


@dataclass(frozen=True)
class GenerationSettings:
    """How a prompt is answered.

    Raises:
        InputError: the settings contradict each other.
    """

    max_new_tokens: Annotated[int, Option("Most tokens to generate.", min=1)] = 128
    sampling: Sampling = Sampling()
    method: Annotated[Literal["tidal", "full"], Option("By the plan, or full attention in every layer.")] = "tidal"
    compare: Annotated[bool, Option("Decode with full attention too, and show both times.")] = False
    passes: Passes = Passes()
    plan: PlanName = "auto"
    budget: Annotated[
        int | float | None,
        Option("Tokens a sparse layer reads, or a fraction of the context.", metavar="K", parse=one_budget),
    ] = None

    def __post_init__(self) -> None:
        if self.compare and self.method == "full":
            raise InputError("--compare compares a plan with full attention: leave out --method full")
        if self.compare and self.sampling.temperature > 0:
            raise InputError("--compare compares greedy decoding: leave out --temperature")
        if self.method == "full" and (self.plan != "auto" or self.budget is not None):
            raise InputError("--method full reads everything: leave out --plan and --budget")
        if self.method == "full" and self.passes.asked:
            raise InputError("--method full reads everything: leave out --lossless and --correction-interval")

    def find_plan(self, config: PreTrainedConfig) -> TidalPlan:
        """The plan for a model, see `tidaldecode.plans.find.find_plan`."""
        from tidaldecode.plans.find import find_plan

        plan = find_plan("full" if self.method == "full" else self.plan, config)
        return plan if self.budget is None else plan.with_budget(self.budget)
