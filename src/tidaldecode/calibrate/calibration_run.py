"""A calibration at work: the windows that are read, the plans that are tried, and the search by numbers of layers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from tidaldecode.calibrate.allocation_search import AllocationSearch
from tidaldecode.calibrate.assignment import Assignment
from tidaldecode.calibrate.attention_weights import ChosenSets
from tidaldecode.calibrate.loss import Loss, mean_loss
from tidaldecode.calibrate.lost_mass import measure_lost_mass
from tidaldecode.calibrate.points import BestPoints, Point
from tidaldecode.calibrate.questions import prompts
from tidaldecode.calibrate.search import Layers, Search
from tidaldecode.calibrate.settings import RECENT_TOKENS, SINK_TOKENS, CalibrationSettings
from tidaldecode.calibrate.stretches import Stretch, with_probes
from tidaldecode.errors import InputError
from tidaldecode.evaluate.free_running import OwnAnswer, own_answers, surprise
from tidaldecode.evaluate.generation_settings import Sampling
from tidaldecode.evaluate.perplexity import perplexity
from tidaldecode.evaluate.study import OnProgress, measure
from tidaldecode.methods.method import Method
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models import model_shape, sliding_windows
from tidaldecode.plan import TidalPlan, recent_among
from tidaldecode.texts.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SAMPLING = Sampling(temperature=0.7)
"""How answers are written: greedy ones may go round in circles, which full attention finds ever more probable."""


class WithCodes(DecodeAttention):
    """A plan at work on a cache that keeps codes in all layers, so that the next plan finds them there."""

    def code_bits(self, layer: int) -> int:
        """See `Attention`."""
        return 0 if self.plan.roles[layer] is None else self.plan.key_bits or 0


class CalibrationRun:
    """One calibration at work; it can be stopped at any time."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: CalibrationSettings,
        on_progress: OnProgress,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.model, self.settings, self.on_progress, self.tokenizer = model, settings, on_progress, tokenizer
        self.answers = settings.answers if tokenizer is not None else 0
        self.shape = model_shape(model.config)
        windows = sliding_windows(model.config)
        self.layers = tuple(layer for layer, window in enumerate(windows) if window is None)
        self.sink_tokens: int = SINK_TOKENS[0]
        self.recent_tokens: int | float = RECENT_TOKENS[0]
        self.stretches: list[Stretch] = []
        self.points = BestPoints(settings.max_gap)
        self.tried = self.done = 0
        by_number, (self.full_layers, select_layers) = settings.max_gap is None, settings.most_layers
        self.first = self.full_layers + 1
        self.last = self.full_layers + select_layers if by_number else len(self.layers) - 1
        self.begun = (
            settings.windows + bool(self.answers) + len(SINK_TOKENS) + len(RECENT_TOKENS) + 1
        )  # two looks at the attention
        self.per_size = Search.most_tries + len(settings.token_budgets) - 1
        if settings.code_bits:
            self.begun += 2 * len(settings.token_budgets) - 2  # a look for each budget
            self.per_size, self.last = AllocationSearch.most_tries, self.first
        # how many sizes a largest gap takes is not known before: the total grows with each
        self.total = self.begun + (self.last - self.first + 1 if by_number else 1) * self.per_size

    def step(self, what: str) -> None:
        """Says what begins, and counts it."""
        self.on_progress(self.done, self.total, what)
        self.done += 1

    def read(self, text: Text) -> None:
        """Reads the windows."""
        settings, probes = self.settings, self.settings.probes
        generator = torch.Generator().manual_seed(settings.seed)
        for number, start in enumerate(settings.starts(text), start=1):
            self.step(f"reading window {number} of {settings.windows}")
            window = text.window(start, settings.context - probes.steps)
            window = with_probes(window, settings.decode, probes, generator)
            stretch = Stretch.read(self.model, window, settings.decode, probes.steps)
            stretch.check()
            self.stretches.append(stretch)
        if self.answers:
            self.step("full attention's own answers")
            for own in self.own_answers(text, settings.starts(text)):
                tokens = torch.tensor([[*own.prompt, *own.answer]])
                self.stretches.append(Stretch.read(self.model, tokens, 0, len(own.answer)))

    def own_answers(self, text: Text, starts: Sequence[int]) -> list[OwnAnswer]:
        """Full attention's answers to questions about windows of a text, sampled."""
        assert self.tokenizer is not None
        settings = self.settings
        asked = prompts(self.tokenizer, text, starts, settings.context - settings.decode, self.answers)
        return own_answers(self.model, list(asked), settings.decode, SAMPLING)

    def search(self) -> None:
        """Finds the best plan of one size after another."""
        settings = self.settings
        search = Search(
            self.assignment(),
            lambda layers: self.measure(search.assignment, layers),
            self.full_layers,
            settings.tries,
        )
        layers = search.start(min(self.last, self.first + 1))
        self.choose_shares((len(layers.reading), settings.budget), self.plan(search.assignment, layers))
        search.assignment = self.assignment()
        for number, layers in enumerate(search.sizes(self.first, self.last), start=1):
            self.other_budgets(len(layers.reading))
            self.done = self.begun + number * self.per_size
            self.total = max(self.total, self.done + self.per_size * (len(layers.reading) < self.last))
            if settings.max_gap is not None and not self.cheaper_possible(settings.max_gap, len(layers.reading) + 1):
                return

    def cheaper_possible(self, max_gap: float, size: int) -> bool:
        """Whether a plan with so many layers that read everything could be cheaper than the best within the gap."""
        chosen = self.points.chosen
        if chosen.loss.text_divergence > max_gap:
            return True
        share = min(self.settings.token_budgets) / self.settings.context
        return (size + (len(self.layers) - size) * share) / len(self.layers) < chosen.kv_read_fraction

    def assignment(self) -> Assignment:
        """What the layers lose by each other's choice, with the present sinks and recent tokens."""
        self.step("attention of all layers")
        settings = self.settings
        recent = recent_among(settings.budget, self.recent_tokens)
        sets = ChosenSets(settings.selections, settings.budget, self.sink_tokens, recent)
        lost = measure_lost_mass(self.stretches, sets)
        return Assignment.of(self.shape, self.layers, lost, sets.of(self.shape), settings.per_query_head)

    def choose_shares(self, key: Hashable, plan: TidalPlan) -> None:
        """Chooses how many sinks and recent tokens every set holds, on a plan that is only predicted to be good."""
        losses: dict[tuple[int, int | float], float] = {}

        def try_shares(sinks: int, recent: float) -> None:
            fields = {**plan.model_dump(), "sink_tokens": sinks, "recent_tokens": recent}
            losses[sinks, recent] = self.add(key, TidalPlan.validated(**fields), "sinks and recent tokens")

        for recent in RECENT_TOKENS:
            try_shares(SINK_TOKENS[0], recent)
        recent = min(losses, key=losses.__getitem__)[1]
        for sinks in SINK_TOKENS[1:]:
            if sinks <= min(self.settings.token_budgets) / 4:
                try_shares(sinks, recent)
        self.sink_tokens, self.recent_tokens = min(losses, key=losses.__getitem__)

    def plan(self, assignment: Assignment, layers: Layers) -> TidalPlan:
        """The plan in which these layers read everything."""
        return TidalPlan.validated(
            model=self.shape,
            roles=assignment.roles(layers.reading, layers.select),
            selection=self.settings.selections[0],
            token_budget=self.settings.budget,
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
            sources=assignment.sources(layers.reading, layers.select) or None,
        )

    def measure(self, assignment: Assignment, layers: Layers) -> float:
        """The loss of a plan with these layers."""
        size = len(layers.reading)
        best = self.points.best.get((size, self.settings.budget))
        so_far = "" if best is None else f", best so far {best.loss.divergence:.4f}"
        what = f"plans in which {size} layers read everything{so_far}"
        return self.add((size, self.settings.budget), self.plan(assignment, layers), what)

    def other_budgets(self, size: int) -> None:
        """The best plan of a size with the other budgets."""
        best = self.points.best.get((size, self.settings.budget))
        if best is None:
            raise InputError(f"no plan in which {size} layers read everything has a finite loss")
        plan = best.plan
        for budget in self.settings.token_budgets:
            if budget != self.settings.budget:
                self.add((size, budget), plan.with_budget(budget), f"budget {budget}")

    def add(self, key: Hashable, plan: TidalPlan, what: str) -> float:
        """The loss of a plan on all windows, infinite where it overflows; the plan is kept if it is the best so far."""
        self.step(what)
        self.tried += 1
        share = DecodeAttention(plan, self.shape).kv_read_fraction(self.settings.context)
        return self.points.add(key, Point(plan, self.loss(plan), share))

    def loss(self, plan: TidalPlan) -> Loss:
        """What a plan loses on all windows."""
        attention = WithCodes if self.settings.code_bits else DecodeAttention
        return mean_loss(self.stretches, attention(plan, self.shape))

    def check(self, heldout: Text) -> None:
        """Measures the plans of the frontier, and the one that is chosen, on the held-out text."""
        frontier = self.points.frontier
        keys = [key for key, point in self.points.best.items() if any(point is other for other in frontier)]
        plans = [
            self.points.best[key].plan.model_copy(update={"name": f"plan {number} of {len(keys)}"})
            for number, key in enumerate(keys, start=1)
        ]

        def on_progress(done: int, total: int, what: str) -> None:
            self.on_progress(self.total + done, self.total + total + bool(self.answers), f"held-out {what}")
            self.done = self.total + total

        methods = [Method.named("tidal", None, plan) for plan in plans]
        study = perplexity(heldout, self.settings.heldout(heldout), methods)
        rows = measure(study, self.model, on_progress=on_progress)
        for key, row in zip(keys, rows[1:], strict=True):
            self.points.best[key] = replace(self.points.best[key], heldout_gap=row.gap, heldout_error=row.gap_stderr)
        if self.answers:
            self.check_answers(heldout)

    def check_answers(self, heldout: Text) -> None:
        """Measures what full attention makes of the answers that the chosen plan gives about the held-out text."""
        self.on_progress(self.done, self.done + 1, "held-out questions")
        key = next(key for key, point in self.points.best.items() if point is self.points.chosen)
        point, settings = self.points.best[key], self.settings
        own = self.own_answers(heldout, settings.heldout(heldout).starts)
        found = surprise(self.model, own, Method.named("tidal", None, point.plan), settings.decode, SAMPLING)
        self.on_progress(self.done + 1, self.done + 1, "held-out questions")
        self.points.best[key] = replace(point, heldout_surprise=found.mean, heldout_surprise_error=found.stderr)
