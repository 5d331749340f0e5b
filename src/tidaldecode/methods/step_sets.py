"""Where the index sets of a step lie, how many tokens a plan chooses for them, and which query head reads which."""

from __future__ import annotations

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
        counts: [B], int32; valid entries of each of a sequence's sets.
        choice: tokens to choose.
    """

    indices: Tensor
    counts: Tensor
    choice: Choice

    @classmethod
    def room(cls, lengths: Tensor, num_sets: int, width: int, choice: Choice) -> StepSets:
        """Room for the sets of sequences of these lengths, [B]."""
        with torch.inference_mode(False):
            return cls(lengths.new_zeros(len(lengths), num_sets, width), torch.zeros_like(lengths), choice)

    def of(self, rows: slice) -> StepSets:
        """The part for some of the sequences."""
        return StepSets(self.indices[rows], self.counts[rows], self.choice.of(rows))

    def count(self, lengths: Tensor) -> None:
        """Writes how many tokens the sets of sequences of these lengths hold, [B]."""
        torch.minimum(self.choice.budgets, lengths, out=self.counts)


def fits(table: Tensor | None, lengths: Tensor, width: int) -> bool:
    """Whether a table, [B, S, width], is one for sequences of these lengths, [B]."""
    return table is not None and table.shape[::2] == (len(lengths), width) and table.device == lengths.device


def map_of_heads(shape: ModelShape, selection: str, device: torch.device) -> Tensor | None:
    """The map from query heads to all the sets of one rule; `None` where `sparse_attention` needs none."""
    heads, sets = shape.num_query_heads, shape.num_sets(selection)
    if sets in (1, shape.num_kv_heads, heads):
        return None
    return torch.arange(heads, device=device) * sets // heads


def choice_like(plan: TidalPlan, lengths: Tensor) -> Choice:
    """Room for what a plan chooses for sequences of these lengths, [B]; filled where it goes by no length."""
    budget = min(plan.budget_for(1), torch.iinfo(torch.int32).max)
    return Choice.alike(lengths, budget, plan.recent_for(budget), plan.sink_tokens)


def write_budgets(plan: TidalPlan, lengths: Tensor, choice: Choice) -> None:
    """Writes `plan.budget_for` and `plan.recent_for` of every length, on the device, into what `choice_like` made."""
    if isinstance(plan.token_budget, int):
        return
    exact = torch.ceil(lengths.double() * plan.token_budget).clamp(min=plan.budget_for(1))
    choice.budgets.copy_(exact)
    if isinstance(plan.recent_tokens, float):
        choice.recents.copy_((exact * plan.recent_tokens).floor().clamp(min=1))
