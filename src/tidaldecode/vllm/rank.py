"""A plan's decode attention on one rank of tensor parallelism."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.attention import DecodeAttention, StepSets
from tidaldecode.errors import InputError
from tidaldecode.plan import ModelShape, TidalPlan
from tidaldecode.vllm.reads import Reads

_SCORE_BYTES = 256 * 2**20
"""Most memory for the scores between attention and selection: more sequences are attended to some at a time."""

_SET_BYTES = 2**30
"""Most memory for the sets of a step that decodes more tokens than there may be requests: after a preemption."""

_ROWS = 512
"""Most sequences that a kernel is launched for, as in vLLM's largest CUDA graph."""


class Group(Protocol):
    """The ranks that share a model's heads; vLLM's `GroupCoordinator`."""

    rank_in_group: int
    world_size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        ...

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors of all ranks, side by side."""
        ...


class RankAttention(DecodeAttention):
    """Decode attention of one rank's heads, with room for the index sets of every head of the model.

    A rank chooses the sets of its own heads. Where heads of one rank read sets of another's, select layers exchange
    them. Unified selection adds up the importances of all ranks, so that each chooses the same tokens.

    Args:
        plan, shape: as for `DecodeAttention`; the shape is the whole model's.
        group: the ranks.
        capacity: the longest that a sequence can become.

    Attributes:
        reads: what the decode steps have read.
        most_rows: tokens that a step can decode.

    Raises:
        InputError: the plan chooses per KV head, and the heads of a KV head are on several ranks.
    """

    def __init__(self, plan: TidalPlan, shape: ModelShape, group: Group, capacity: int) -> None:
        size, rank = group.world_size, group.rank_in_group
        mine = shape.num_query_heads // size
        super().__init__(plan, shape, range(rank * mine, (rank + 1) * mine))
        if size > shape.num_kv_heads and any("per_group" in rules for rules in self.writes.values()):
            raise InputError(
                f"the plan chooses tokens per KV head, and the model's {shape.num_kv_heads} can't be split over "
                f"{size} ranks: start with --tensor-parallel-size {shape.num_kv_heads} or less, or with another plan"
            )
        self.group = group
        self._longest = capacity
        self._room: StepSets | None = None
        self.reads = Reads(self, logged=group.rank_in_group == 0)
        self.most_rows = 0
        self._exchanges = {layer for layer in self.writes if self._read_elsewhere(layer)}

    def _read_elsewhere(self, layer: int) -> bool:
        """Whether a head of any rank reads a set that a select layer chose for a head of another."""
        whole = DecodeAttention(self.plan, self.shape)
        mine = len(self.heads)
        for rows in whole.head_to_set.values():
            by_head = rows.repeat_interleave(self.shape.num_query_heads // len(rows)).tolist()
            for head, row in enumerate(by_head):
                for rule in self.writes[layer]:
                    sets = self.shape.num_sets(rule)
                    place = row - self._first_row[layer, rule]
                    if (
                        rule != "unified"
                        and 0 <= place < sets
                        and head // mine != place * self.group.world_size // sets
                    ):
                        return True
        return False

    @property
    def first_layer(self) -> int:
        """The lowest layer that has a role."""
        return next(layer for layer, role in enumerate(self.plan.roles) if role is not None)

    def reads_everything(self, layer: int) -> bool:
        """Whether a layer needs nothing of ours: it has no role, or attends to the whole cache and chooses nothing."""
        return self.plan.roles[layer] is None or self.is_full(layer)

    def is_short(self, length: int) -> bool:
        """Whether a sequence is read in full, as each shorter one is, because it is no longer than its budget."""
        return self.plan.budget_for(length) >= length

    def reserve(self, rows: int, most_tokens: int, device: torch.device) -> None:
        """Makes room for the sets of `rows` sequences, once, in memory that CUDA graphs may refer to.

        While vLLM measures how much memory a model takes, this also takes what a select layer needs for its scores, and
        what a step of `most_tokens` decoded tokens needs, and gives it back.
        """
        if self._room is None:
            self._room = self._allocate(rows, self._longest, device)
            of_one = self._room.indices[0].numel() * 4
            self.most_rows = max(rows, _SET_BYTES // max(of_one, 1))
            torch.empty(2, self._at_once(), len(self.heads), self._longest, device=device)
            torch.empty(min(self.most_rows, most_tokens) * of_one, dtype=torch.uint8, device=device)

    def _at_once(self) -> int:
        """Sequences that a select layer attends to at a time."""
        return max(1, min(_ROWS, _SCORE_BYTES // (len(self.heads) * self._longest * 4)))

    def begin(self, lengths: Tensor, capacity: int | None = None) -> None:
        """Starts a step of up to as many sequences as there is room for; of more in memory of its own."""
        assert self._room is not None
        rows = len(lengths)
        if rows <= len(self._room.counts):
            sets = self._room.of(rows)
        else:
            self.indices = self.counts = None  # those of such a step before
            sets = self._allocate(rows, self._longest, lengths.device)
        self._use(sets, self._longest)
        self._count(lengths)

    def attend(
        self,
        layer: int,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> Tensor:
        """As `DecodeAttention.attend`, some sequences at a time where they are very many."""
        if len(query) <= _ROWS or self.plan.roles[layer] == "select":
            return super().attend(layer, query, k_cache, v_cache, block_table, lengths, scale)
        assert self.indices is not None and self.counts is not None
        whole, outputs = (self.indices, self.counts), []
        for start in range(0, len(query), _ROWS):
            part = slice(start, start + _ROWS)
            self.indices, self.counts = whole[0][part], whole[1][part]
            outputs.append(
                super().attend(layer, query[part], k_cache, v_cache, block_table[part], lengths[part], scale)
            )
        self.indices, self.counts = whole
        return torch.cat(outputs)

    def _select(
        self,
        layer: int,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> Tensor:
        at_once = self._at_once()
        parts = [slice(start, start + at_once) for start in range(0, len(query), at_once)]
        outputs = [
            self._select_some(layer, part, query[part], k_cache, v_cache, block_table[part], lengths[part], scale)
            for part in parts
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if layer in self._exchanges:
            self._exchange(layer)
        return output

    def _select_some(
        self,
        layer: int,
        part: slice,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> Tensor:
        assert self._budgets is not None and self._recents is not None
        cache = (k_cache, v_cache, block_table, lengths, scale, self.writes[layer])
        choice = (self._budgets[part], self._recents[part], self.plan.sink_tokens)
        if self.group.world_size == 1:
            table = self._written_by(layer)[part]
            return ops.full_attention_with_selection(query, *cache, *choice, self._longest, table)
        mine = self._mine(layer)
        width = sum(rows.stop - rows.start for rows in mine)
        dtype = torch.promote_types(query.dtype, torch.float32)
        importance = query.new_empty(len(query), width, self._longest, dtype=dtype)
        output = ops.full_attention_with_importance(query, *cache, importance)
        start = 0
        for rule, rows in zip(self.writes[layer], mine, strict=True):
            of_rule = importance[:, start : start + rows.stop - rows.start]
            if rule == "unified":
                of_rule = self.group.all_reduce(of_rule.contiguous())
            assert self.indices is not None
            ops.select_tokens(of_rule, lengths, *choice, self.indices[part, rows])
            start += rows.stop - rows.start
        return output

    def _mine(self, layer: int) -> list[slice]:
        """For each rule of a select layer, the rows of the table that this rank writes."""
        rows = []
        for rule in self.writes[layer]:
            first, sets = self._first_row[layer, rule], self.shape.num_sets(rule)
            per_rank = 1 if rule == "unified" else sets // self.group.world_size
            start = first if rule == "unified" else first + self.group.rank_in_group * per_rank
            rows.append(slice(start, start + per_rank))
        return rows

    def _exchange(self, layer: int) -> None:
        """Brings the sets that the other ranks chose."""
        assert self.indices is not None
        for rule, rows in zip(self.writes[layer], self._mine(layer), strict=True):
            if rule != "unified":
                first = self._first_row[layer, rule]
                mine = self.indices[:, rows].contiguous().view(torch.float32)  # vLLM gathers no integers on a CPU
                everyone = self.group.all_gather(mine, dim=1).view(torch.int32)
                self.indices[:, first : first + self.shape.num_sets(rule)] = everyone
