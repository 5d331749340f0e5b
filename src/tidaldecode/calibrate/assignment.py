"""From the layers that read everything to a plan: which of them select, and which set each head of the others reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode.plan import ModelShape, Role, Selection, Source


@dataclass(frozen=True)
class Assignment:
    """What is known of a model's layers before a plan is tried.

    Attributes:
        shape: of the model.
        layers: those that attend to the whole context, in order; only they can have a role.
        lost: [L, L, R]; attention mass that a reader of the first layer (an Hq-th or Hkv-th part of its query heads)
            loses by the best set of the second; infinite where there is none.
        best: [L, L, R]; the place of that set in `sets`.
        sets: rule and head of the sets that a layer chooses.
        weights: [L]; nats of divergence for a unit of mass that a layer loses.
    """

    shape: ModelShape
    layers: tuple[int, ...]
    lost: Tensor
    best: Tensor
    sets: tuple[tuple[Selection, int], ...]
    weights: Tensor

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        layers: Sequence[int],
        lost: Tensor,
        sets: tuple[tuple[Selection, int], ...],
        per_query_head: bool,
    ) -> Assignment:
        """The assignment by measured lost mass, all layers weighing the same.

        Args:
            lost: see `measure_lost_mass`; masses of the query heads that read one set are added up.
            per_query_head: whether each query head reads a set of its own, or the query heads of a KV head read one, so
                that each row of K and V is read once for all of them.
        """
        readers = 1 if per_query_head else shape.group_size
        least = lost.view(*lost.shape[:3], -1, readers).sum(4).min(2)  # of [L, L, S, R]
        weights = torch.ones(shape.num_layers).double()
        return cls(shape, tuple(layers), least.values.double(), least.indices, sets, weights)

    def losses(self, reading: frozenset[int], select: frozenset[int]) -> Tensor:
        """The mass that each layer loses under a plan, [L]: zero where it reads everything, infinite without a source.

        Args:
            reading: the layers that read everything.
            select: those of them that choose.
        """
        losses = torch.zeros(self.shape.num_layers, dtype=torch.float64)
        if sparse := [layer for layer in self.layers if layer not in reading]:
            losses[sparse] = (
                self.lost[sparse][:, sorted(select)].amin(1).sum(1) if select else losses.new_tensor(torch.inf)
            )
        return losses

    def predicted(self, reading: frozenset[int], select: frozenset[int]) -> float:
        """The divergence that the weights let expect; infinite where a sparse layer has no select layer below it."""
        losses = self.losses(reading, select)
        return float((losses * self.weights).sum()) if losses.isfinite().all() else float("inf")

    def select_layers(self, reading: frozenset[int], most: int) -> frozenset[int]:
        """Which of the layers that read everything should choose: those that are missed least are left out, one by one.

        Args:
            reading: the layers that read everything.
            most: how many may choose.

        Returns:
            At most `most` layers, each of which some head reads; as few as possible where none is read.
        """
        select = reading
        while len(select) > most:
            rest = [select - {layer} for layer in sorted(select)]
            select = min(rest, key=lambda layers: (self.predicted(reading, layers), sorted(layers)))
        return frozenset(layer for layers in self._sources(reading, select).values() for layer, _ in layers)

    def _sources(self, reading: frozenset[int], select: frozenset[int]) -> dict[int, list[tuple[int, int]]]:
        """Of each sparse layer and reader the layer and set that lose least."""
        columns, sources = sorted(select), {}
        for layer in self.layers if columns else ():
            if layer not in reading:
                below = [columns[column] for column in self.lost[layer, columns].argmin(0).tolist()]
                sources[layer] = [(row, int(self.best[layer, row, reader])) for reader, row in enumerate(below)]
        return sources

    def roles(self, reading: frozenset[int], select: frozenset[int]) -> tuple[Role | None, ...]:
        """The roles of all layers."""
        names: dict[int, Role] = {
            layer: "select" if layer in select else "full" if layer in reading else "sparse" for layer in self.layers
        }
        return tuple(names.get(layer) for layer in range(self.shape.num_layers))

    def sources(self, reading: frozenset[int], select: frozenset[int]) -> dict[int, tuple[Source, ...]]:
        """The sources of a plan: for each sparse layer one for each query head."""
        per_reader = self.shape.num_query_heads // self.lost.shape[2]
        return {
            layer: tuple(
                Source(layer=below, selection=self.sets[place][0], head=self.sets[place][1])
                for below, place in readers
                for _ in range(per_reader)
            )
            for layer, readers in self._sources(reading, select).items()
        }
