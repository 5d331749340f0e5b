"""Drafting out of verification: draft steps read what the latest verification pass chose, and no layer reads it all.

Verification attends to the whole cache in every layer. So each layer can choose for itself there, by exact scores, and
the drafts that follow need neither `full` nor `select` layers: each of their layers attends to its own chosen tokens
and to those that came since.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.step_sets import choice_like, map_of_heads, write_budgets
from tidaldecode.ops import KV
from tidaldecode.plan import ModelShape, TidalPlan


class VerifiedDrafts(Attention):
    """The attention of draft steps, as `Attention`, and of the verification passes that choose for them.

    The sets of all layers lie in one table. A pass writes the chosen tokens, and behind them those that can follow, one
    after another; so a draft step takes in one entry more of each set, and writes nothing.

    Args:
        plan: its `selection`, budget, sinks and recent tokens choose, in each layer.
        shape: heads and layers of the model.
        longest: most tokens that are drafted between two passes.

    Attributes:
        indices: the sets, [L, B, S, width], int32; `None` before the first pass.
        counts: valid entries of each of a sequence's sets, [B], int32; the tokens that a draft step reads.
    """

    def __init__(self, plan: TidalPlan, shape: ModelShape, longest: int) -> None:
        self.plan, self.shape, self.longest = plan, shape, longest
        self._newest = 2 * longest + 1  # a pass's tokens, all of which may be accepted, and the drafts behind them
        self._capacity = 0
        self.indices: Tensor | None = None
        self.counts: Tensor | None = None

    # ---- the verification pass

    def begin_pass(self, lengths: Tensor, new_lengths: Tensor, capacity: int) -> None:
        """Starts a verification pass.

        Args:
            lengths: [B], int32; lengths of the sequences, the new tokens included.
            new_lengths: [B], int32; tokens of the pass, at most `longest + 1`.
            capacity: the longest that the sequences can become; sizes the table, once.
        """
        if self.indices is None or capacity > self._capacity or self.indices.shape[1] != len(lengths):
            self._allocate(lengths, capacity)
        assert self.indices is not None
        torch.sub(lengths, new_lengths, out=self._past)
        write_budgets(self.plan, self._past, self._choice)
        torch.minimum(self._choice.budgets, self._past, out=self._chosen)
        following = torch.arange(self._newest, device=lengths.device, dtype=torch.int32)
        shape = *self.indices.shape[:3], self._newest
        entries, tokens = (start[:, None, None] + following for start in (self._chosen, self._past))
        self.indices.scatter_(3, entries.long().expand(shape), tokens.expand(shape))

    def _allocate(self, lengths: Tensor, capacity: int) -> None:
        width = min(self.plan.budget_for(capacity), capacity) + self._newest
        sets = self.shape.num_sets(self.plan.selection)
        with torch.inference_mode(False):  # as the cache: written by later passes, in whatever mode
            self.indices = lengths.new_zeros(self.shape.num_layers, len(lengths), sets, width)
            self.counts, self._past, self._chosen = (torch.zeros_like(lengths) for _ in range(3))
            self._head_to_set = map_of_heads(self.shape, self.plan.selection, lengths.device)
            self._choice = choice_like(self.plan, lengths)
        self._capacity = capacity

    def verify(self, layer: int, query: Tensor, kv: KV, new_lengths: Tensor, scale: float) -> Tensor:
        """Full attention of a pass's tokens in one layer, after `begin_pass`, which chooses what drafts read there.

        Args:
            query: [B, N, Hq, D].
            kv: the layer's cache.
            new_lengths: [B], int32; the last so many rows of `query` are tokens.
            scale: factor of the scores.

        Returns:
            [B, N, Hq, D], dtype of `query`.
        """
        assert self.indices is not None
        return ops.multi_query_attention_with_selection(
            query, kv, new_lengths, scale, self.plan.selection, self._choice, self._capacity, self.indices[layer]
        )

    # ---- draft steps, as `Attention`

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Starts a draft step, after a verification pass: what came since is read too.

        Args:
            lengths: [B], int32; lengths of the sequences, the new tokens included.
            capacity: as for `begin_pass`.
        """
        assert self.counts is not None, "no verification pass has chosen"
        torch.sub(lengths, self._past, out=self.counts)
        # a sequence that ended, and was cut back to its end, may be shorter than what the pass looked at
        self.counts.add_(self._chosen).clamp_(min=0)

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """See `Attention`."""
        assert self.indices is not None and self.counts is not None
        return ops.sparse_attention(query, kv, self.indices[layer], self.counts, self._head_to_set, scale)

    def tokens_read(self, context: int) -> dict[int, float]:
        """See `Attention`; the most tokens that can have come since are counted."""
        count = self.plan.budget_for(context) + self._newest
        read = float(context) if count >= context else count * self.shape.sets_per_kv_head(self.plan.selection)
        return {layer: read for layer, role in enumerate(self.plan.roles) if role is not None}
