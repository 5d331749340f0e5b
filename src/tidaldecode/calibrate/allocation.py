"""How a share of the KV cache is spent: which layers choose by codes of keys, how many tokens, and who reads them.

A layer reads everything, or chooses `b` of `n` tokens by its codes, or reads what layers below it chose. The prediction
of what that loses is as in `search`: lost attention mass times a weight of each layer. For a price of a share of the
cache, `lambda`, loss plus price is made small layer by layer until no layer changes (coordinate descent); the price is
then found by bisection for which the share is what may be read, and what is left of it is spent where it helps most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidaldecode.plan import ModelShape, Role, Selection, Source

FULL, SPARSE = -2, -1
"""States of a layer that chooses nothing; the others are places of budgets."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """The state of each layer that can have a role, and what is known of it before it is tried.

    Attributes:
        states: `FULL`, `SPARSE`, or the place of the budget of the sets that the layer chooses.
        chosen: for each layer and reader (an Hq-th or Hkv-th part of its query heads) the layer whose set it reads.
        losses: the mass that each layer loses.
        share: of the KV cache that a step reads, codes included.
    """

    states: tuple[int, ...]
    chosen: NDArray[np.intp]
    losses: Floats
    share: float

    @property
    def key(self) -> tuple[tuple[int, ...], bytes]:
        """Tells allocations apart; one of the same states may read other sets, by other weights."""
        reading = np.array(self.states) != FULL
        return self.states, self.chosen[reading].tobytes()


@dataclass(frozen=True)
class Allocator:
    """What layers lose by each other's choice, and what reading costs.

    Attributes:
        shape: of the model.
        layers: those that can have a role, in order; all places below are places among them.
        budgets: tokens of a set, increasing.
        lost: [K, L, L, R]; attention mass that a reader of the first layer loses by the best set of the second (itself
            or one below it), by budget; infinite where there is none.
        best: [K, L, L, R]; the place of that set in `sets`.
        sets: rule and head of the sets that a layer chooses.
        context: tokens of a context.
        code_share: bytes of a token's code over those of its K and V.
        weights: [L]; nats of divergence for a unit of mass that a layer loses.
    """

    shape: ModelShape
    layers: tuple[int, ...]
    budgets: tuple[int, ...]
    lost: Floats
    best: NDArray[np.intp]
    sets: tuple[tuple[Selection, int], ...]
    context: int
    code_share: float
    weights: Floats

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        layers: Sequence[int],
        lost: dict[int, Tensor],
        sets: tuple[tuple[Selection, int], ...],
        per_query_head: bool,
        context: int,
        code_share: float,
    ) -> Allocator:
        """The allocator by measured lost mass, all layers weighing the same.

        Args:
            lost: by budget, see `measure_lost_mass`; masses of the query heads that read one set are added up.
            per_query_head: whether each query head reads a set of its own.
        """
        readers = 1 if per_query_head else shape.group_size
        budgets, places = tuple(sorted(lost)), list(layers)
        all_lost = torch.stack([lost[budget][places][:, places] for budget in budgets])
        least = all_lost.view(*all_lost.shape[:4], -1, readers).sum(5).min(3)  # of [K, L, L, S, R]
        values = least.values.double().numpy(), least.indices.numpy()
        return cls(shape, tuple(layers), budgets, *values, sets, context, code_share, np.ones(len(layers)))

    # ---- what an allocation loses and reads

    def allocation(self, states: Sequence[int], price: float) -> Allocation | None:
        """The allocation whose readers read what is best at a price; `None` where a sparse layer has no source."""
        state = np.array(states)
        columns, reading = np.flatnonzero(state >= 0), state != FULL
        losses, chosen = np.zeros(len(state)), np.zeros((len(state), self.lost.shape[3]), dtype=np.intp)
        if len(columns):
            of_columns = self.lost[state[columns], :, columns]  # [C, L, R]
            rows = self._rows[state[columns]][:, None, None]
            costs = self.weights[:, None] * of_columns + price * rows
            place = costs.argmin(0)  # [L, R]
            chosen = columns[place]
            losses = np.take_along_axis(of_columns, place[None], 0)[0].sum(1)
        if not np.isfinite(losses[reading]).all() or (reading.any() and not len(columns)):
            return None
        unread = (state >= 0) & ~np.isin(np.arange(len(state)), chosen[reading])
        read = np.where(reading, self._read(state, chosen) if len(columns) else 0.0, 1.0)
        state[unread] = SPARSE
        share = float((read + np.where(state >= 0, self.code_share, 0.0)).mean())
        return Allocation(tuple(map(int, state)), chosen, np.where(reading, losses, 0.0), share)

    def _read(self, state: NDArray[np.intp], chosen: NDArray[np.intp]) -> Floats:
        """The share of its K and V that each layer reads, [L]: a set once for all heads of a KV head that read it."""
        places, readers = np.arange(len(state))[:, None], np.arange(chosen.shape[1])
        sets = chosen * len(self.sets) + self.best[state[chosen], places, chosen, readers]  # [L, R]
        groups = sets.reshape(len(state), self.shape.num_kv_heads, -1)
        order = groups.argsort(2)
        rows = np.take_along_axis((self._rows[state[chosen]] * len(state)).reshape(groups.shape), order, 2)
        ordered = np.take_along_axis(groups, order, 2)
        rows[:, :, 1:][ordered[:, :, 1:] == ordered[:, :, :-1]] = 0.0
        return np.asarray(rows.sum((1, 2)))

    @property
    def _rows(self) -> Floats:
        """What a reader's set adds to the share that is read, by budget."""
        kv_heads = self.shape.num_kv_heads
        return np.array(self.budgets) / (self.context * len(self.layers) * kv_heads)

    def predicted(self, allocation: Allocation) -> float:
        """The divergence that the weights let expect."""
        return float((allocation.losses * self.weights).sum())

    # ---- the best allocation

    def best_within(self, most: float) -> tuple[Allocation, float] | None:
        """The allocation that is predicted to lose least, and the price that it took, among those that read so little.

        Args:
            most: the largest share of the KV cache.

        Returns:
            `None` where none was found.
        """
        low, high, found = 1e-6, 1e6, None
        for _ in range(30):
            price = float(np.sqrt(low * high))
            allocation = self._descended(price)
            if allocation is not None and allocation.share <= most:
                found, high = (allocation, price), price
            else:
                low = price
        return None if found is None else (self._filled(*found, most), found[1])

    def _descended(self, price: float) -> Allocation | None:
        """From the middle budget everywhere, changes layer by layer, as long as that makes loss plus price smaller."""
        states = np.full(len(self.layers), len(self.budgets) // 2)
        costs = self.weights[:, None, None] * self.lost + price * self._rows[:, None, None, None]  # [K, L, L, R]
        for _ in range(12):
            before = states.copy()
            for layer in range(len(states)):
                states[layer] = self._best_state(states, layer, costs, price)
            if (states == before).all():
                break
        return self.allocation(states.tolist(), price)

    def _best_state(self, states: NDArray[np.intp], layer: int, costs: Floats, price: float) -> int:
        others = np.flatnonzero((states >= 0) & (np.arange(len(states)) != layer))
        shape = costs.shape[1], costs.shape[3]
        best = costs[states[others], :, others].min(0) if len(others) else np.full(shape, np.inf)  # [L, R]
        rest = (states != FULL) & (np.arange(len(states)) != layer)
        with_its = np.minimum(best, costs[:, :, layer])  # [K, L, R]
        chosen = with_its[:, rest].sum((1, 2)) + with_its[:, layer].sum(1) + price * self.code_share / len(states)
        base = best[rest].sum()
        options = [base + price / len(states), base + best[layer].sum(), *chosen]  # FULL, SPARSE, budgets
        return int(np.argmin(options)) + FULL

    def _filled(self, allocation: Allocation, price: float, most: float) -> Allocation:
        """Spends what is left of a share, one change after another, each where it helps most for what it reads."""
        while True:
            loss, better = self.predicted(allocation), []
            for other in self.changed(allocation, price, most):
                gain, more = loss - self.predicted(other), other.share - allocation.share
                if gain > 1e-9:
                    better.append((gain / max(more, 1e-9), other))
            if not better:
                return allocation
            allocation = max(better, key=lambda pair: (pair[0], pair[1].states))[1]

    def changed(self, allocation: Allocation, price: float, most: float) -> Iterator[Allocation]:
        """All allocations that differ in the state of one layer, and read no more than a share."""
        states = allocation.states
        for layer, state in enumerate(states):
            for new in range(FULL, len(self.budgets)):
                if new != state:
                    other = self.allocation([*states[:layer], new, *states[layer + 1 :]], price)
                    if other is not None and other.share <= most and other.key != allocation.key:
                        yield other

    # ---- the plan

    def roles(self, allocation: Allocation) -> tuple[Role | None, ...]:
        """The roles of all layers."""
        names: dict[int, Role] = {
            layer: "full" if state == FULL else "sparse" if state == SPARSE else "quantized_select"
            for layer, state in zip(self.layers, allocation.states, strict=True)
        }
        return tuple(names.get(layer) for layer in range(self.shape.num_layers))

    def budgets_of(self, allocation: Allocation) -> dict[int, int]:
        """The budget of each layer that chooses."""
        states = zip(self.layers, allocation.states, strict=True)
        return {layer: self.budgets[state] for layer, state in states if state >= 0}

    def sources(self, allocation: Allocation) -> dict[int, tuple[Source, ...]]:
        """The sources of a plan: for each layer that reads chosen tokens one for each query head."""
        per_reader = self.shape.num_query_heads // self.lost.shape[3]
        sources = {}
        for place, state in enumerate(allocation.states):
            if state == FULL:
                continue
            names = []
            for reader, below in enumerate(allocation.chosen[place].tolist()):
                rule, head = self.sets[self.best[allocation.states[below], place, below, reader]]
                names += [Source(layer=self.layers[below], selection=rule, head=head)] * per_reader
            sources[self.layers[place]] = tuple(names)
        return sources
