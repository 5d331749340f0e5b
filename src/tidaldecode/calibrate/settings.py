"""What is calibrated, and on which parts of which texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tidaldecode.errors import InputError
from tidaldecode.models import check_architecture, model_shape, sliding_windows
from tidaldecode.options import Option, Seed, budget, integers, names_of
from tidaldecode.plan import KEY_BITS, ModelShape, Selection, recent_among, tokens_of
from tidaldecode.rules import RULES
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SINK_TOKENS = (4, 16)
"""Numbers of sinks that are tried; the first one while the share of recent tokens is chosen."""

RECENT_TOKENS = (0.25, 0.125, 0.5)
"""Shares of the budget that are tried for recent tokens.

Never none of either: teacher-forced text hardly misses them, and a model that writes by itself goes wrong without."""

_SELECT_LAYERS, _FULL_LAYERS = 5, 2
_BUDGETS, _GAP_BUDGETS = (256,), (64, 128, 256, 512, 1024)
SHARES = (0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4)
"""Shares of K and V that are tried one after another until a plan with codes loses little enough."""

_BITS, _SHARES = 2, (7, 6, 5, 4, 3)  # of the context: from a 128th to an eighth
_COHERENCE_WINDOWS = Windows(context=4096, decode=64, windows=4)
_RUN = 128  # tokens in a row by which two texts are told to overlap: more than a licence's header shares


@dataclass(frozen=True)
class Probes:
    """Stretches of a prompt that are said again behind its text: what a plan must find far back.

    Attributes:
        count: how many, from depths evenly spaced over the prompt.
        tokens: of each.
    """

    count: int = 4
    tokens: int = 24

    @property
    def steps(self) -> int:
        """Decode steps of all of them."""
        return self.count * self.tokens


@dataclass(frozen=True)
class CalibrationSettings:
    """What plan is looked for, and on which decode steps.

    Attributes:
        budgets: the search goes by the middle one; layers that choose by codes get one of them each.
        select_layers: the best plans with fewer are found on the way.
        max_gap: the largest divergence from full attention on the text, in nats per token (`Loss.text_divergence`).
        max_read: the largest share of K and V that a step reads at the end of a window, codes counted.
        key_bits: see `TidalPlan`; then any layer may choose by codes, and the cheapest allocation is looked for.
        decode: decode steps of a window that predict the text's own tokens.
        heldout_windows, heldout_decode: of the text that the plan is checked on; at most a quarter of a window is
            decoded.
        answers: questions that are asked about the text, whose answers, full attention's own, are decoded beside its
            windows; and about the other text, see `Calibration.heldout_surprise`. As long as `decode` at most.
        per_query_head: whether each query head reads a set of its own, at the price of more rows, instead of one for
            the query heads of a KV head.
        probes: stretches of each prompt that are said again behind its text.
        tries: see `Search`.
        seed: of the windows' places, and the probes'.

    Raises:
        InputError: the settings contradict each other, or leave nothing to calibrate.
    """

    budgets: Annotated[
        tuple[int, ...] | None,
        Option(
            f"Tokens that a sparse layer reads; with --max-gap also several, K,... Default: {_BUDGETS[0]}, with "
            f"--max-gap {','.join(map(str, _GAP_BUDGETS))}.",
            name="--budget",
            metavar="K",
            parse=integers,
        ),
    ] = None
    select_layers: Annotated[
        int | None, Option(f"Layers that choose. Default: {_SELECT_LAYERS}.", metavar="N", min=1)
    ] = None
    full_layers: Annotated[
        int | None, Option(f"Layers beside them that read everything. Default: {_FULL_LAYERS}.", metavar="N", min=0)
    ] = None
    max_gap: Annotated[
        float | None, Option("Find the cheapest plan that loses so little, instead of N layers.", metavar="NATS")
    ] = None
    max_read: Annotated[
        float | None,
        Option("Find the plan that loses least and reads so little of K and V, by codes of keys.", metavar="SHARE"),
    ] = None
    key_bits: Annotated[
        int | None,
        Option(
            f"Layers choose by codes of keys of so many bits a channel: {', '.join(map(str, KEY_BITS))}. "
            f"Default: with --max-read {_BITS}, else no codes.",
            metavar="BITS",
        ),
    ] = None
    selections: Annotated[
        tuple[Selection, ...],
        Option(
            f"Rules of choice: of {', '.join(RULES)}.",
            name="--selection",
            metavar="S,...",
            parse=names_of(*RULES),
        ),
    ] = ("unified", "per_group")
    per_query_head: Annotated[bool, Option("A set for each query head, which reads more rows.")] = False
    context: Annotated[int, Option("Tokens of a window.", min=1)] = 8192
    decode: Annotated[int, Option("Last tokens of a window, decoded.", min=1)] = 192
    windows: Annotated[int, Option("Windows that the plan is chosen on.", min=1)] = 4
    heldout_windows: Annotated[int, Option("Windows that it is checked on.", min=1)] = 8
    heldout_decode: int = 384
    answers: Annotated[
        int, Option("Questions about each text; full attention's own answers choose and check the plan.", min=0)
    ] = 4
    probes: Probes = Probes()
    tries: int = 12
    seed: Seed = 0

    def __post_init__(self) -> None:
        self._check_goal()
        budgets = self.token_budgets
        if self.first_step <= 2 * self.probes.steps:
            raise InputError(
                f"a context of {self.context} tokens is too short for {self.decode} decode steps and the "
                f"{self.probes.steps} of the probes: lower the decode steps"
            )
        least = next(budget for budget in itertools.count(1) if budget > SINK_TOKENS[0] + _most_recent(budget))
        if min(budgets) < least:
            raise InputError(
                f"budget {min(budgets)} is too small: {SINK_TOKENS[0]} sinks, half of it recent tokens and a "
                f"chosen one make {least}"
            )
        if max(budgets) >= self.first_step:
            raise InputError(
                f"budget {max(budgets)} leaves nothing to calibrate: the first decode step of a window has a "
                f"context of {self.first_step} tokens, and all of it would be read"
            )

    def _check_goal(self) -> None:
        goals = {"--max-gap": self.max_gap, "--max-read": self.max_read, "--key-bits": self.key_bits}
        goal = next((option for option, value in goals.items() if value is not None), None)
        for option, number in (("--select-layers", self.select_layers), ("--full-layers", self.full_layers)):
            if goal is not None and number is not None:
                raise InputError(f"give {option} or {goal}, not both: with {goal} the search decides how many it takes")
        if self.max_gap is not None and not 0 < self.max_gap < float("inf"):
            raise InputError(f"a largest gap of {self.max_gap} nats must be positive")
        if self.max_read is not None and not 0 < self.max_read < 1:
            raise InputError(f"a largest share of {self.max_read} must lie between 0 and 1")
        if self.max_gap is not None and self.max_read is not None:
            raise InputError("give --max-gap or --max-read, not both: one finds the cheapest plan, the other the best")
        if self.key_bits is not None and self.key_bits not in KEY_BITS:
            raise InputError(f"codes of {self.key_bits} bits: there are those of {', '.join(map(str, KEY_BITS))}")
        if self.key_bits is not None and self.max_gap is None and self.max_read is None:
            raise InputError("codes of keys need a goal: give --max-read or --max-gap")
        if goal is None and len(self.token_budgets) > 1:
            raise InputError("several budgets need --max-gap or --max-read: a number of select layers takes one")

    @property
    def code_bits(self) -> int:
        """Bits of the codes that layers choose by; 0 if they read everything to choose."""
        return self.key_bits or (0 if self.max_read is None else _BITS)

    @property
    def token_budgets(self) -> tuple[int, ...]:
        """The budgets that are given, or the default's."""
        if self.budgets:
            return tuple(dict.fromkeys(self.budgets))
        if self.code_bits:
            least = next(budget for budget in itertools.count(1) if budget > SINK_TOKENS[0] + _most_recent(budget))
            return tuple(sorted({max(least, self.context >> shift) for shift in _SHARES}))
        return _BUDGETS if self.max_gap is None else _GAP_BUDGETS

    @property
    def most_layers(self) -> tuple[int, int]:
        """How many layers read everything without choosing, and how many may choose; with a gap all may."""
        if self.max_gap is not None or self.code_bits:
            return 0, 1
        full = _FULL_LAYERS if self.full_layers is None else self.full_layers
        return full, self.select_layers or _SELECT_LAYERS

    def to_json(self) -> dict[str, Any]:
        """The settings, with those that were left to defaults, as results hold them."""
        by_number = self.max_gap is None and not self.code_bits
        full, select = self.most_layers if by_number else (None, None)
        found = {"select_layers": select, "full_layers": full, "key_bits": self.code_bits or None}
        return {**asdict(self), **found, "budgets": self.token_budgets}

    @property
    def first_step(self) -> int:
        """Tokens that the first decode step of a window sees."""
        return self.context - self.decode - self.probes.steps

    @property
    def heldout_steps(self) -> int:
        """Decode steps of a held-out window."""
        return min(self.heldout_decode, self.context // 4)

    @property
    def budget(self) -> int:
        """The budget that the search goes by."""
        return sorted(self.token_budgets)[len(self.token_budgets) // 2]

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses a model that can't be calibrated so.

        Raises:
            InputError: its architecture is not supported, the context is beyond its positions, or it has too few
                layers.
        """
        check_architecture(config)
        Windows(self.context, self.decode, 1).check(config)
        layers = sum(window is None for window in sliding_windows(config))
        if self.code_bits:
            self._check_codes(model_shape(config), layers)
        full, select = self.most_layers
        if full + select >= layers:
            raise InputError(
                f"{full} full and {select} select layers leave no sparse one among the {layers} layers of the model "
                "that attend to the whole context: ask for fewer"
            )

    def _check_codes(self, shape: ModelShape, layers: int) -> None:
        from tidaldecode.ops.values import code_share  # imports PyTorch

        if shape.head_dim * self.code_bits % 8:
            raise InputError(
                f"codes of {self.code_bits} bits of {shape.head_dim} channels fill no whole bytes: give others"
            )
        tokens, most = min(self.token_budgets), self.shares[-1]
        least = tokens / self.context + code_share(self.code_bits, shape.head_dim) / layers
        if least > most:
            raise InputError(
                f"no plan reads as little as {most:.1%} of K and V: with codes in one layer and {tokens} tokens in all "
                f"it is {least:.1%}. Give a larger share, a smaller budget or fewer bits"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The largest shares of K and V that plans with codes are looked for at, one after another."""
        return SHARES if self.max_read is None else (self.max_read,)

    def starts(self, text: Text) -> tuple[int, ...]:
        """Places of the windows in the text that the plan is chosen on: apart, and random by the seed.

        Raises:
            InputError: the text is too short.
        """
        import torch

        spare = self._spare(text, self.windows, "text to calibrate on", "windows")
        generator = torch.Generator().manual_seed(self.seed)
        offsets = torch.randint(spare + 1, (self.windows,), generator=generator).sort().values.tolist()
        return tuple(offset + number * self.context for number, offset in enumerate(offsets))

    def heldout(self, text: Text) -> Windows:
        """Windows of the text that the plan is checked on: evenly spaced, the same for every seed.

        Raises:
            InputError: the text is too short.
        """
        between = max(1, self.heldout_windows - 1)
        stride = self.context + self._spare(text, self.heldout_windows, "held-out text", "held-out windows") // between
        return Windows(self.context, self.heldout_steps, self.heldout_windows, 0, stride)

    def _spare(self, text: Text, windows: int, what: str, option: str) -> int:
        """Tokens of a text that so many windows leave over.

        Raises:
            InputError: it is too short for them.
        """
        there, needed = len(text.tokens), windows * self.context - len(text.prefix)
        if there < needed:
            raise InputError(
                f"the {what} has {there} tokens, {needed - there} too few for {windows} windows of {self.context}: "
                f"give more text, or lower the {option} or the context"
            )
        return there - needed


@dataclass(frozen=True)
class CoherenceSettings:
    """What is chosen, and at which decode steps of a text.

    Attributes:
        windows: the decode steps; the prompts before them are read with full attention.
        budget: of a choice, sinks and the new token included.

    Raises:
        InputError: the budget leaves nothing to choose.
    """

    windows: Windows = _COHERENCE_WINDOWS
    selections: Annotated[
        tuple[Selection, ...],
        Option(
            f"Whose scores choose: of {', '.join(RULES)}.",
            name="--selection",
            metavar="S,...",
            parse=names_of(*RULES),
        ),
    ] = tuple(RULES)
    budget: Annotated[
        int | float, Option("Tokens that a layer chooses, or a fraction of the context.", metavar="K", parse=budget)
    ] = 256
    sink_tokens: Annotated[int, Option("First tokens that every choice holds.", metavar="N", min=0)] = 0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.tokens < self.sink_tokens + 2:
            raise InputError(
                f"budget {self.tokens} leaves nothing to choose: {self.sink_tokens} sinks, the new token and a chosen "
                f"one make {self.sink_tokens + 2}"
            )
        shortest = self.windows.context - self.windows.decode
        if self.tokens >= shortest:
            raise InputError(
                f"budget {self.tokens} leaves nothing to choose: the first decode step of a window has a context of "
                f"{shortest} tokens"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a choice."""
        return tokens_of(self.budget, self.windows.context)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses a model that can't be measured.

        Raises:
            InputError: its architecture is not supported, or the context is beyond its positions.
        """
        check_architecture(config)
        self.windows.check(config)


def _most_recent(budget: int) -> int:
    return max(recent_among(budget, recent) for recent in RECENT_TOKENS)


def check_apart(text: Text, starts: Sequence[int], heldout: Text, windows: Windows) -> None:
    """Refuses a check on what the plan was chosen on.

    Args:
        text, starts: where the windows of the one begin.
        heldout, windows: of the other.

    Raises:
        InputError: they share a run of tokens.
    """

    def runs(text: Text, start: int) -> set[bytes]:
        window = text.tokens[start : start + windows.context]
        return {run.tobytes() for run in window.unfold(0, min(_RUN, len(window)), 1).numpy()}

    seen = set[bytes]().union(*(runs(text, start) for start in starts))
    for start in windows.starts:
        if not seen.isdisjoint(runs(heldout, start)):
            raise InputError(
                f"the held-out text overlaps the text to calibrate on (in its window from token {start} on), and a "
                "gap measured there would say nothing: give another text"
            )
