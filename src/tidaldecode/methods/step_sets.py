"""Where the index sets of a step lie, how many tokens a plan chooses for them, and which query head reads which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode.ops import Choice
from tidaldecode.plan import ModelShape, TidalPlan


@dataclass(frozen=True)
class StepSets:
    """Where a step's index sets go.

    Attributes:
        indices: [B, num_sets, width], int32; the table of index sets.
        counts: valid entries of a sequence's sets, int32: [B] where all have the same budget, else [B, num_sets].
        choices: tokens to choose, by budget.
    """

    indices: Tensor
    counts: Tensor
    choices: tuple[Choice, ...]

    @classmethod
    def room(cls, lengths: Tensor, num_sets: int, width: int, *choices: Choice) -> StepSets:
        """Room for the sets of sequences of these lengths, [B]."""
        with torch.inference_mode(False):
            counts = torch.zeros_like(lengths)
            if len(choices) > 1:
                counts = lengths.new_zeros(num_sets, len(lengths)).T  # a set's counts lie together, for kernels
            return cls(lengths.new_zeros(len(lengths), num_sets, width), counts, choices)

    @property
    def choice(self) -> Choice:
        """Of the only budget."""
        (choice,) = self.choices
        return choice

    def of(self, rows: slice) -> StepSets:
        """The part for some of the sequences."""
        return StepSets(self.indices[rows], self.counts[rows], tuple(choice.of(rows) for choice in self.choices))

    def count(self, lengths: Tensor, sets: Sequence[slice] = ()) -> None:
        """Writes how many tokens the sets of sequences of these lengths hold, [B].

        Args:
            sets: of each budget, where there are several.
        """
        if not sets:
            torch.minimum(self.choice.budgets, lengths, out=self.counts)
        for part, choice in zip(sets, self.choices if sets else (), strict=True):
            self.counts.T[part] = torch.minimum(choice.budgets, lengths)


def fits(table: Tensor | None, lengths: Tensor, width: int) -> bool:
    """Whether a table, [B, S, width], is one for sequences of these lengths, [B]."""
    return table is not None and table.shape[::2] == (len(lengths), width) and table.device == lengths.device


def map_of_heads(shape: ModelShape, selection: str, device: torch.device) -> Tensor | None:
    """The map from query heads to all the sets of one rule; `None` where `sparse_attention` needs none."""
    heads, sets = shape.num_query_heads, shape.num_sets(selection)
    if sets in (1, shape.num_kv_heads, heads):
        return None
    return torch.arange(heads, device=device) * sets // heads


def choice_like(plan: TidalPlan, lengths: Tensor, layer: int | None = None) -> Choice:
    """Room for what a plan chooses for sequences of these lengths, [B]; filled where it goes by no length.

    Args:
        layer: the one that chooses, which may have a budget of its own.
    """
    budget = min(plan.budget_for(1, layer), torch.iinfo(torch.int32).max)
    return Choice.alike(lengths, budget, plan.recent_for(budget), plan.sink_tokens)


def write_budgets(plan: TidalPlan, lengths: Tensor, choice: Choice, layer: int | None = None) -> None:
    """Writes `plan.budget_for` and `plan.recent_for` of every length, on the device, into what `choice_like` made."""
    fraction = plan.budget_of(layer)
    if isinstance(fraction, int):
        return
    exact = torch.ceil(lengths.double() * fraction).clamp(min=plan.budget_for(1, layer))
    choice.budgets.copy_(exact)
    if isinstance(plan.recent_tokens, float):
        choice.recents.copy_((exact * plan.recent_tokens).floor().clamp(min=1))
