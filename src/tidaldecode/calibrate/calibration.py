"""Calibration: from a model and a text to the plan that loses least, and what it loses on a text that it never saw."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from tidaldecode.calibrate.assignment import Assignment
from tidaldecode.calibrate.lost_mass import measure_lost_mass
from tidaldecode.calibrate.prompts import Loss, Prompt, mean_loss, read_prompts
from tidaldecode.calibrate.search import Layers, Search
from tidaldecode.calibrate.settings import RECENT_TOKENS, SINK_TOKENS, CalibrationSettings, check_apart
from tidaldecode.errors import InputError
from tidaldecode.evaluate.perplexity import CELL_KEY, perplexity
from tidaldecode.methods.method import Method
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models.architecture import model_shape, sliding_windows
from tidaldecode.plan import TidalPlan, recent_among
from tidaldecode.results.cells import Cells
from tidaldecode.texts.text import Text

OnProgress = Callable[[int, int, str], None]
"""Told how many parts of how many are done, and in words what comes next."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """A plan, what it costs and what it loses.

    Attributes:
        loss: on the text that it was chosen on.
        kv_read_fraction: share of the KV cache that a step reads at a window's end.
        heldout_gap, heldout_error: nats per token above full attention on the held-out text, and the standard error
            over its windows; `None` before the check, and the error of a single window.
    """

    plan: TidalPlan
    loss: Loss
    kv_read_fraction: float
    heldout_gap: float | None = None
    heldout_error: float | None = None


@dataclass(frozen=True)
class Found:
    """What a calibration found.

    Attributes:
        chosen: the plan that was asked for, or the best so far.
        frontier: the best plans, the cheapest first: each loses less than those before it, but for `chosen`, which is
            always among them.
        tried: how many plans were tried.
        stopped: whether it was interrupted, or failed: plans may be left untried, and the check undone.
    """

    chosen: Point
    frontier: tuple[Point, ...]
    tried: int
    stopped: bool


def calibrate(
    model: PreTrainedModel,
    text: Text,
    heldout: Text,
    settings: CalibrationSettings,
    on_progress: OnProgress = lambda done, total, what: None,
) -> Found:
    """Finds the plan that loses least on a text, and measures what it loses on another.

    The windows of the text are read once, with full attention, and kept. A plan that is tried costs one pass over their
    decode steps; its loss is the divergence of its next-token distributions from full attention's (`Loss`). See
    docs/calibration.md for what the search does and why.

    Interrupted (Ctrl-C), or failing once a plan was tried, it returns the best plan so far.

    Args:
        model: with a plan applied (any).
        text: long enough, see `CalibrationSettings.starts`.
        heldout: likewise, see `CalibrationSettings.heldout`; shares no window with `text`.
        settings: what is looked for.
        on_progress: see `OnProgress`.

    Raises:
        InputError: the model can't be calibrated so, a text is too short, they overlap, or full attention's own
            predictions are not finite.
        KeyboardInterrupt: interrupted before any plan was tried.
    """
    settings.check(model.config)
    check_apart(text, settings.starts(text), heldout, settings.heldout(heldout))
    run = _Run(model, settings, on_progress)
    stopped = False
    try:
        run.read(text)
        run.search()
        run.prompts.clear()  # their caches make room for the held-out windows'
        run.check(heldout)
    except KeyboardInterrupt:
        if not run.points:
            raise
        stopped = True
    except InputError as error:
        if not run.points:
            raise
        _log.warning("the calibration ended early, and keeps the best plan so far: %s", error)
        stopped = True
    return Found(run.chosen(), tuple(_frontier(run.points, run.chosen())), run.tried, stopped)


def _frontier(points: Sequence[Point], chosen: Point) -> Iterator[Point]:
    """The points that lose less than every cheaper one, and the chosen one, the cheapest first."""
    least = math.inf
    for point in sorted(points, key=lambda point: (point.kv_read_fraction, point.loss.divergence)):
        if point.loss.divergence < least or point is chosen:
            least = min(least, point.loss.divergence)
            yield point


@dataclass
class _Run:
    """One calibration at work; `points` holds the best plan of each size and budget, whenever it is stopped."""

    model: PreTrainedModel
    settings: CalibrationSettings
    on_progress: OnProgress
    prompts: list[Prompt] = field(default_factory=list)
    best: dict[tuple[int, int], Point] = field(default_factory=dict)  # by layers that read everything, and budget
    tried: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        self.shape = model_shape(self.model.config)
        windows = sliding_windows(self.model.config)
        self.layers = tuple(layer for layer, window in enumerate(windows) if window is None)
        self.sink_tokens: int = SINK_TOKENS[0]
        self.recent_tokens: int | float = RECENT_TOKENS[0]
        by_number = settings.select_layers is not None
        self.full_layers = settings.full_layers if by_number else 0
        self.first = settings.full_layers + 1 if by_number else 1
        self.last = settings.full_layers + (settings.select_layers or 0) if by_number else len(self.layers) - 1
        self.begun = settings.windows + len(SINK_TOKENS) + len(RECENT_TOKENS) + 1  # two looks at the attention
        # how many sizes a largest gap takes is not known before: the total grows with each
        self.total = self.begun + (self.last - self.first + 1 if by_number else 1) * self._per_size

    @property
    def _per_size(self) -> int:
        return Search.most_tries + len(self.settings.budgets) - 1

    @property
    def points(self) -> list[Point]:
        return list(self.best.values())

    def chosen(self) -> Point:
        """The plan that was asked for: the cheapest within the gap, or that with the least loss."""
        gap = self.settings.max_gap
        within = [] if gap is None else [point for point in self.points if point.loss.text_divergence <= gap]
        if within:
            return min(within, key=lambda point: (point.kv_read_fraction, point.loss.divergence))
        return min(self.points, key=lambda point: (point.loss.divergence, point.kv_read_fraction))

    def step(self, what: str) -> None:
        """Says what begins, and counts it."""
        self.on_progress(self.done, self.total, what)
        self.done += 1

    def read(self, text: Text) -> None:
        """Reads the windows."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed)
        self.prompts = read_prompts(
            self.model,
            text,
            settings.starts(text),
            settings.context,
            settings.decode,
            settings.probes,
            generator,
            lambda number: self.step(f"reading window {number + 1} of {settings.windows}"),
        )

    def search(self) -> None:
        """Finds the best plan of one size after another."""
        settings = self.settings
        search = Search(
            self.assignment(), lambda layers: self.measure(search.assignment, layers), self.full_layers, settings.tries
        )
        self.choose_shares(search)
        search.assignment = self.assignment()
        for number, layers in enumerate(search.sizes(self.first, self.last), start=1):
            self.other_budgets(len(layers.reading))
            self.done = self.begun + number * self._per_size
            self.total = max(self.total, self.done + self._per_size * (len(layers.reading) < self.last))
            if settings.max_gap is not None and not self.cheaper_possible(len(layers.reading) + 1):
                return

    def cheaper_possible(self, size: int) -> bool:
        """Whether a plan with so many layers that read everything could be cheaper than the best within the gap."""
        assert self.settings.max_gap is not None
        chosen = self.chosen()
        if chosen.loss.text_divergence > self.settings.max_gap:
            return True
        share = min(self.settings.budgets) / self.settings.context
        return (size + (len(self.layers) - size) * share) / len(self.layers) < chosen.kv_read_fraction

    def assignment(self) -> Assignment:
        """What the layers lose by each other's choice, with the present sinks and recent tokens."""
        self.step("attention of all layers")
        budget = self.settings.budget
        recent = recent_among(budget, self.recent_tokens)
        lost = measure_lost_mass(self.model, self.prompts, self.settings.selections, budget, self.sink_tokens, recent)
        return Assignment.of(self.shape, self.layers, lost, self.settings.per_query_head)

    def choose_shares(self, search: Search) -> None:
        """Chooses how many sinks and recent tokens every set holds, on a plan that is only predicted to be good."""
        layers = search.start(min(self.last, self.first + 1))
        tries = [(SINK_TOKENS[0], recent) for recent in RECENT_TOKENS]
        losses = {shares: self.with_shares(search.assignment, layers, *shares) for shares in tries}
        recent = min(losses, key=losses.__getitem__)[1]
        for sinks in SINK_TOKENS[1:]:
            if sinks <= min(self.settings.budgets) / 4:
                losses[sinks, recent] = self.with_shares(search.assignment, layers, sinks, recent)
        self.sink_tokens, self.recent_tokens = min(losses, key=losses.__getitem__)

    def with_shares(self, assignment: Assignment, layers: Layers, sinks: int, recent: int | float) -> float:
        """The loss of a plan with so many sinks and recent tokens."""
        self.sink_tokens, self.recent_tokens = sinks, recent
        plan = self.plan(assignment, layers)
        return self.keep(len(layers.reading), plan, self.loss(plan, "sinks and recent tokens"))

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

    def loss(self, plan: TidalPlan, what: str) -> Loss:
        """The loss of a plan on all windows."""
        self.step(what)
        self.tried += 1
        return mean_loss(self.model, self.prompts, DecodeAttention(plan, self.shape))

    def measure(self, assignment: Assignment, layers: Layers) -> float:
        """The loss of a plan with these layers, which is kept if it is the best of its size."""
        plan, size = self.plan(assignment, layers), len(layers.reading)
        best = self.best.get((size, self.settings.budget))
        so_far = "" if best is None else f", best so far {best.loss.divergence:.4f}"
        return self.keep(size, plan, self.loss(plan, f"plans in which {size} layers read everything{so_far}"))

    def other_budgets(self, size: int) -> None:
        """The best plan of a size with the other budgets."""
        plan = self.best[size, self.settings.budget].plan
        for budget in self.settings.budgets:
            if budget != self.settings.budget:
                other = plan.with_budget(budget)
                self.keep(size, other, self.loss(other, f"budget {budget}"))

    def keep(self, size: int, plan: TidalPlan, loss: Loss) -> float:
        """Keeps a plan if it is the best of its size and budget; its loss, infinite where it overflows."""
        assert isinstance(plan.token_budget, int)
        if not math.isfinite(loss.divergence):
            return math.inf
        best = self.best.get((size, plan.token_budget))
        if best is None or loss.divergence < best.loss.divergence:
            reads = DecodeAttention(plan, self.shape).kv_read_fraction(self.settings.context)
            self.best[size, plan.token_budget] = Point(plan, loss, reads)
        return loss.divergence

    def check(self, heldout: Text) -> None:
        """Measures the plans of the frontier, and the one that is chosen, on the held-out text."""
        wanted = list(_frontier(self.points, self.chosen()))
        checked = {key: point for key, point in self.best.items() if any(point is other for other in wanted)}
        methods = [
            Method("tidal", None, point.plan.model_copy(update={"name": f"plan {number + 1} of {len(checked)}"}))
            for number, point in enumerate(checked.values())
        ]

        def on_progress(done: int, total: int, what: str) -> None:
            self.on_progress(self.total + done, self.total + total, f"held-out {what}")

        rows = perplexity(self.model, heldout, self.settings.heldout(heldout), methods, Cells(CELL_KEY), on_progress)
        for (key, point), row in zip(checked.items(), rows[1:], strict=True):
            self.best[key] = replace(point, heldout_gap=row.gap, heldout_error=row.gap_stderr)
