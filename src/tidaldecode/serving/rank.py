"""A plan's decode attention on one rank of tensor parallelism."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.errors import InputError
from tidaldecode.methods.tidal import DecodeAttention, StepSets
from tidaldecode.ops import KV
from tidaldecode.plan import ModelShape, TidalPlan
from tidaldecode.serving.read_counts import ReadCounts

_SCORE_BYTES = 2**29
"""Most memory for what lies between attention and selection: where it takes more, sequences take turns."""

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
        read_counts: what the decode steps have read.
        most_rows: tokens that a step can decode.
        captures_own: whether a CUDA graph that is captured now is of the engine's own attention.
        wants_own: whether the step at hand is the engine's own attention's: all its sequences are short.

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
        self.read_counts = ReadCounts(self, told=group.rank_in_group == 0)
        self.most_rows = 0
        self.captures_own = self.wants_own = False
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

    @property
    def has_room(self) -> bool:
        """Whether there is room for sets: see `reserve`."""
        return self._room is not None

    def needs(self, rows: int, most_tokens: int) -> tuple[int, int]:
        """Bytes that `reserve` keeps, and those that a step takes beside them.

        Args:
            rows: the most requests at once.
            most_tokens: the most tokens of a step.
        """
        of_one = self._bytes_of_one
        between = len(self.heads) * self._longest * 4
        between = min(_SCORE_BYTES + between, rows * between)  # a turn ends with the sequence that goes beyond
        return rows * of_one, max(between, min(self._most_rows(rows), most_tokens) * of_one)

    def reserve(self, rows: int, most_tokens: int, device: torch.device) -> None:
        """Makes room for the sets of `rows` sequences, once, in memory that CUDA graphs may refer to.

        What a step takes beside them is taken, too, and given back: an engine measures how much memory a model takes.
        """
        if self._room is not None:
            return
        self.most_rows = self._most_rows(rows)
        self._room = self._allocate(rows, self._longest, device)
        torch.empty(self.needs(rows, most_tokens)[1], dtype=torch.uint8, device=device)

    @property
    def _bytes_of_one(self) -> int:
        """Bytes of the sets of a sequence."""
        return self.num_sets * min(self.plan.budget_for(self._longest), self._longest) * 4

    def _most_rows(self, rows: int) -> int:
        return max(rows, _SET_BYTES // max(self._bytes_of_one, 1))

    def begin(self, lengths: Tensor, capacity: int | None = None) -> None:
        """Starts a step of up to as many sequences as there is room for; of more in memory of its own.

        Args:
            lengths: [B], int32.
            capacity: none of them is longer; default: the longest that a sequence can become, as in a CUDA graph.
        """
        assert self._room is not None
        rows, capacity = len(lengths), self._longest if capacity is None else capacity
        if rows <= len(self._room.counts):
            sets = self._room.of(rows)
        else:
            self.indices = self.counts = None  # those of such a step before
            sets = self._allocate(rows, capacity, lengths.device)
        self._use(sets, capacity)
        self._count(lengths)

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """As `DecodeAttention.attend`, some sequences at a time where they are very many."""
        if len(query) <= _ROWS or self.plan.roles[layer] == "select":
            return super().attend(layer, query, kv, scale)
        assert self.indices is not None and self.counts is not None
        whole, outputs = (self.indices, self.counts), []
        for start in range(0, len(query), _ROWS):
            part = slice(start, start + _ROWS)
            self.indices, self.counts = whole[0][part], whole[1][part]
            outputs.append(super().attend(layer, query[part], kv.of(part), scale))
        self.indices, self.counts = whole
        return torch.cat(outputs)

    def _select(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        at_once = self._at_once(layer, query)
        parts = [slice(start, start + at_once) for start in range(0, len(query), at_once)]
        outputs = [self._select_some(layer, part, query[part], kv.of(part), scale) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if layer in self._exchanges:
            self._exchange(layer)
        return output

    def _at_once(self, layer: int, query: Tensor) -> int:
        """Sequences that a select layer attends to at a time; kernels let them take turns by themselves."""
        if self._adds_up(layer):
            each = sum(part.stop - part.start for part in self._mine(layer)) * self._capacity * 4
        else:
            each = 0 if ops.has_kernel(query) else len(self.heads) * self._capacity * 4
        return max(1, min(_ROWS, _SCORE_BYTES // max(each, 1)))

    def _adds_up(self, layer: int) -> bool:
        """Whether the ranks' importances must be there before a select layer can choose."""
        return self.group.world_size > 1 and (len(self.writes[layer]) > 1 or "unified" in self.writes[layer])

    def _select_some(self, layer: int, part: slice, query: Tensor, kv: KV, scale: float) -> Tensor:
        assert self._choice is not None and self.indices is not None
        choice, rules = self._choice.of(part), self.writes[layer]
        mine = self._mine(layer)
        if not self._adds_up(layer):
            table = self._written_by(layer)[part] if self.group.world_size == 1 else self.indices[part, mine[0]]
            return ops.full_attention_with_selection(query, kv, scale, rules, choice, self._capacity, table)
        width = sum(rows.stop - rows.start for rows in mine)
        dtype = torch.promote_types(query.dtype, torch.float32)
        importance = query.new_empty(len(query), width, self._capacity, dtype=dtype)
        output = ops.full_attention_with_importance(query, kv, scale, rules, importance)
        start = 0
        for rule, rows in zip(rules, mine, strict=True):
            of_rule = importance[:, start : start + rows.stop - rows.start]
            if rule == "unified":
                of_rule = self.group.all_reduce(of_rule.contiguous())
            ops.select_tokens(of_rule, kv.lengths, choice, self.indices[part, rows])
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
