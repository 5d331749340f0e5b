"""The search among plans whose layers choose by codes of keys: the best one that reads a share of K and V."""

from __future__ import annotations

from collections.abc import Sequence

from tidaldecode.calibrate.allocation import Allocation, Allocator
from tidaldecode.calibrate.allocation_search import AllocationSearch
from tidaldecode.calibrate.attention_weights import ChosenSets
from tidaldecode.calibrate.calibration_run import CalibrationRun
from tidaldecode.calibrate.lost_mass import measure_lost_mass
from tidaldecode.errors import InputError
from tidaldecode.ops.values import code_share
from tidaldecode.plan import TidalPlan, recent_among


class SharesByCodes:
    """The part of a calibration that searches by shares of K and V.

    Args:
        run: the calibration; its windows are read.
    """

    def __init__(self, run: CalibrationRun) -> None:
        self.run, self.settings = run, run.settings
        self._share = 0.0

    def search(self) -> None:
        """Finds the best plan that reads a share, or the cheapest within a gap.

        Raises:
            InputError: nothing reads as little.
        """
        run, gap = self.run, self.settings.max_gap
        shares = self.settings.shares
        search = AllocationSearch(self.allocator(), self.measure, self.settings.tries)
        self._search = search
        run.choose_shares(*self.first(shares))
        search.allocator = self.allocator()
        for number, self._share in enumerate(shares, start=1):
            search.best_within(self._share)
            run.done = run.begun + number * run.per_size
            run.total = max(run.total, run.done + run.per_size * (number < len(shares)))
            if gap is not None and run.points.best and run.points.chosen.loss.text_divergence <= gap:
                return

    def first(self, shares: Sequence[float]) -> tuple[float, TidalPlan]:
        """The least share that a plan reads, and such a plan, which is only predicted to be good.

        Raises:
            InputError: nothing reads as little as the largest share.
        """
        allocator = self._search.allocator
        for share in shares:
            if (found := allocator.best_within(share)) is not None:
                return share, self.plan(found[0])
        raise InputError(
            f"no plan that reads as little as {shares[-1]:.1%} of K and V was found: give a larger share, a smaller "
            "budget or fewer bits"
        )

    def allocator(self) -> Allocator:
        """What the layers lose by each other's choice of each budget, with the present sinks and recent tokens."""
        run, settings, lost = self.run, self.settings, {}
        for budget in settings.token_budgets:
            run.step(f"attention of all layers, {budget} tokens")
            recent = recent_among(budget, run.recent_tokens)
            sets = ChosenSets(settings.selections, budget, run.sink_tokens, recent, settings.code_bits)
            lost[budget] = measure_lost_mass(run.stretches, sets)
        share = code_share(settings.code_bits, run.shape.head_dim)
        of_shape = sets.of(run.shape)
        return Allocator.of(run.shape, run.layers, lost, of_shape, settings.per_query_head, settings.context, share)

    def plan(self, allocation: Allocation) -> TidalPlan:
        """The plan of an allocation; its `token_budget` is the one by which most layers choose."""
        run, allocator = self.run, self._search.allocator
        budgets = allocator.budgets_of(allocation)
        usual = max(allocator.budgets, key=lambda budget: (list(budgets.values()).count(budget), budget))
        return TidalPlan.validated(
            model=run.shape,
            roles=allocator.roles(allocation),
            selection=self.settings.selections[0],
            key_bits=self.settings.code_bits if budgets else None,
            token_budget=usual,
            budgets={layer: budget for layer, budget in budgets.items() if budget != usual} or None,
            sink_tokens=run.sink_tokens,
            recent_tokens=run.recent_tokens,
            sources=allocator.sources(allocation) or None,
        )

    def measure(self, allocation: Allocation) -> float:
        """The loss of the plan of an allocation."""
        best = self.run.points.best.get(self._share)
        so_far = "" if best is None else f", best so far {best.loss.divergence:.4f}"
        what = f"plans that read {self._share:.1%} of K and V{so_far}"
        return self.run.add(self._share, self.plan(allocation), what)
