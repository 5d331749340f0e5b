"""A plan's decode attention on one rank of tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.errors import InputError
from tidaldecode.methods.step_sets import StepSets
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.ops import KV, rounds
from tidaldecode.plan import ModelShape, Selection, TidalPlan
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


@dataclass(frozen=True)
class Limits:
    """What an engine may ask for.

    Attributes:
        context: the longest that a sequence can become.
        requests: the most at once.
        tokens: the most of a step.
    """

    context: int
    requests: int
    tokens: int


class RankAttention(DecodeAttention):
    """Decode attention of one rank's heads, with room for the index sets of every head of the model.

    A rank chooses the sets of its own heads. Where heads of one rank read sets of another's, select layers exchange
    them. Unified selection adds up the importances of all ranks, so that each chooses the same tokens.

    Args:
        plan, shape: as for `DecodeAttention`; the shape is the whole model's.
        group: the ranks.
        limits: what there must be room for.

    Attributes:
        limits: as given.
        read_counts: what the decode steps have read.
        most_rows: tokens that a step can decode.
        kept_bytes: memory of the sets of `limits.requests` sequences, see `reserve`.
        step_bytes: most memory that a step takes beside them.
        captures_own: whether a CUDA graph that is captured now is of the engine's own attention.
        wants_own: whether the step at hand is the engine's own attention's: all its sequences are short.

    Raises:
        InputError: the plan chooses per KV head, and the heads of a KV head are on several ranks.
    """

    def __init__(self, plan: TidalPlan, shape: ModelShape, group: Group, limits: Limits) -> None:
        size, rank = group.world_size, group.rank_in_group
        mine = shape.num_query_heads // size
        super().__init__(plan, shape, range(rank * mine, (rank + 1) * mine))
        if size > shape.num_kv_heads and any("per_group" in rules for rules in self.writes.values()):
            raise InputError(
                f"the plan chooses tokens per KV head, and the model's {shape.num_kv_heads} can't be split over "
                f"{size} ranks: start with --tensor-parallel-size {shape.num_kv_heads} or less, or with another plan"
            )
        self.group = group
        self.read_counts = ReadCounts(self, told=rank == 0)
        self.limits = limits
        self._room: StepSets | None = None
        of_one = self.num_sets * self.width(self.writes, limits.context) * 4
        self.most_rows = max(limits.requests, _SET_BYTES // max(of_one, 1))
        self.kept_bytes = limits.requests * of_one
        self.captures_own = self.wants_own = False
        self._mine = {layer: self._rows_of_rank(layer) for layer in self.writes}
        rows = min(self.most_rows, limits.tokens)
        sets = rows * of_one if rows > limits.requests else 0  # `begin` makes room for them in the step
        self.step_bytes = sets + max((self._choice_bytes(layer, min(rows, _ROWS)) for layer in self.writes), default=0)
        self._exchanges = self._read_elsewhere()

    def _choice_bytes(self, layer: int, rows: int) -> int:
        """Most memory of what lies between a select layer's scores and its sets, for so many sequences at a time."""
        context, group, codes = self.limits.context, min(self.shape.group_size, len(self.heads)), self.code_bits(layer)
        kv_heads = len(self.heads) // group
        if codes:
            pair = rounds.pair_of(self.shape.head_dim * codes // 8, group)
            scores = rounds.score_bytes(kv_heads, group, rounds.tile_of(pair), pair)
        else:
            scores = rounds.score_bytes(kv_heads, group, rounds.LEAST_TILE, size=4)  # of the widest queries
        sets = [part.stop - part.start for part in self._mine[layer]]
        if not self._adds_up(layer):
            return rounds.round_bytes(rows, context, scores + rounds.list_bytes(sum(sets)))
        of_set = context * 4
        importance = min(rows * sum(sets) * of_set, max(sum(sets) * of_set, _SCORE_BYTES))
        after = max(
            rounds.round_bytes(rows, context, rounds.list_bytes(number))
            # one that is shared among others is copied, and added up into one more
            + (importance // sum(sets) * min(len(sets), 2) if self._shared(rule) else 0)
            for rule, number in zip(self.writes[layer], sets, strict=True)
        )
        return importance + max(rounds.round_bytes(rows, context, scores), after)

    def _rows_of_rank(self, layer: int) -> list[slice]:
        """For each rule of a select layer, the rows of the table that this rank writes."""
        rows = []
        for rule in self.writes[layer]:
            start, number = self._first_row[layer, rule], 1
            if not self._shared(rule):
                number = self.shape.num_sets(rule) // self.group.world_size
                start += self.group.rank_in_group * number
            rows.append(slice(start, start + number))
        return rows

    def _shared(self, rule: Selection) -> bool:
        """Whether the heads of all ranks share the one set of a rule, whose importances are added up then."""
        return self.shape.num_sets(rule) == 1

    def _read_elsewhere(self) -> set[int]:
        """Select layers of whose sets a head of any rank reads one that another rank chose."""
        size, heads = self.group.world_size, self.shape.num_query_heads
        return {
            source.layer
            for layer in self.plan.reading
            for head, source in enumerate(self.plan.sources_of(layer, self.shape))
            if not self._shared(source.selection)
            and head * size // heads != source.head * size // self.shape.num_sets(source.selection)
        }

    @property
    def first_layer(self) -> int:
        """The lowest layer that has a role."""
        return next(layer for layer, role in enumerate(self.plan.roles) if role is not None)

    def reads_everything(self, layer: int) -> bool:
        """Whether a layer needs nothing of ours: it has no role, or attends to the whole cache and chooses nothing."""
        return self.plan.roles[layer] is None or self.is_full(layer)

    def is_short(self, length: int) -> bool:
        """Whether a sequence is read in full, as each shorter one is, because it is no longer than its budget."""
        return all(self.plan.budget_for(length, layer) >= length for layer in self.budgets)

    @property
    def has_room(self) -> bool:
        """Whether there is room for sets: see `reserve`."""
        return self._room is not None

    def reserve(self, device: torch.device) -> None:
        """Makes room for the sets, once, in memory that CUDA graphs may refer to.

        What a step takes beside them is taken, too, and given back: an engine measures how much memory a model takes.
        """
        if self._room is None:
            self._room = self._allocate(self.limits.requests, self.limits.context, device)
            torch.empty(self.step_bytes, dtype=torch.uint8, device=device)

    def begin(self, lengths: Tensor, capacity: int | None = None) -> None:
        """Starts a step of up to as many sequences as there is room for; of more in memory of its own.

        Args:
            lengths: [B], int32.
            capacity: none of them is longer; default: the longest that a sequence can become, as in a CUDA graph.
        """
        assert self._room is not None
        rows, capacity = len(lengths), self.limits.context if capacity is None else capacity
        if rows <= len(self._room.counts):
            sets = self._room.of(slice(rows))
        else:
            self.indices = self.counts = None  # those of such a step before
            sets = self._allocate(rows, capacity, lengths.device)
        self._use(sets, capacity)
        self._count(lengths)

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """As `DecodeAttention.attend`, some sequences at a time where they are very many."""
        at_once = self._at_once(layer, query)
        if len(query) <= at_once:
            return super().attend(layer, query, kv, scale)
        return self._in_turns(at_once, layer, query, kv, scale)

    def _in_turns(self, at_once: int, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        whole, outputs = self._step_sets(), []
        for start in range(0, len(query), at_once):
            part = slice(start, start + at_once)
            self._use(whole.of(part), self._capacity)
            outputs.append(super().attend(layer, query[part], kv.of(part), scale))
        self._use(whole, self._capacity)
        return torch.cat(outputs)

    def _at_once(self, layer: int, query: Tensor) -> int:
        """Sequences that a layer attends to at a time; kernels of a select layer let them take turns by themselves."""
        if layer not in self.writes:
            each = 0
        elif self._adds_up(layer):
            each = sum(rows.stop - rows.start for rows in self._mine[layer]) * self._capacity * 4
        else:
            each = 0 if ops.has_kernel(query) else len(self.heads) * self._capacity * 4
        return max(1, min(_ROWS, _SCORE_BYTES // max(each, 1)))

    def _adds_up(self, layer: int) -> bool:
        """Whether the ranks' importances must be there before a select layer can choose."""
        rules = self.writes[layer]
        return self.group.world_size > 1 and (len(rules) > 1 or self._shared(rules[0]))

    def _select(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        if self._adds_up(layer):
            dtype = torch.promote_types(query.dtype, torch.float32)
            importance = self._room_for_importance(layer, query, dtype)
            output = ops.full_attention_with_importance(query, kv, scale, self.writes[layer], importance)
            self._select_together(layer, importance, kv)
        else:
            output = super()._select(layer, query, kv, scale)
        self._exchange(layer)
        return output

    def _choose_by_codes(self, layer: int, query: Tensor, kv: KV, scale: float) -> None:
        if self._adds_up(layer):
            importance = self._room_for_importance(layer, query, torch.float32)
            ops.importance_by_codes(query, kv, scale, self.writes[layer], importance)
            self._select_together(layer, importance, kv)
        else:
            super()._choose_by_codes(layer, query, kv, scale)
        self._exchange(layer)

    def _room_for_importance(self, layer: int, query: Tensor, dtype: torch.dtype) -> Tensor:
        sets = sum(rows.stop - rows.start for rows in self._mine[layer])
        return query.new_empty(len(query), sets, self._capacity, dtype=dtype)

    def _select_together(self, layer: int, importance: Tensor, kv: KV) -> None:
        """Selects by the importances of the ranks, added up where they share a set."""
        assert self.indices is not None
        mine = self._mine[layer]
        widths = [rows.stop - rows.start for rows in mine]
        for rule, rows, of_rule in zip(self.writes[layer], mine, torch.split(importance, widths, 1), strict=True):
            if self._shared(rule):
                of_rule = self.group.all_reduce(of_rule.contiguous())
            written = self.indices[:, rows, : self.width([layer], self._capacity)]
            ops.select_tokens(of_rule, kv.lengths, self.choice_of(layer), written)

    def _written_by(self, layer: int) -> Tensor:
        """Of the rows of the table that a select layer writes those of this rank, [B, S, width]."""
        assert self.indices is not None
        rows = slice(self._mine[layer][0].start, self._mine[layer][-1].stop)
        return self.indices[:, rows, : self.width([layer], self._capacity)]

    def _exchange(self, layer: int) -> None:
        """Brings the sets that the other ranks chose, where heads of this one or another read them."""
        if layer not in self._exchanges:
            return
        assert self.indices is not None
        for rule, rows in zip(self.writes[layer], self._mine[layer], strict=True):
            if not self._shared(rule):
                first = self._first_row[layer, rule]
                mine = self.indices[:, rows].contiguous().view(torch.float32)  # vLLM gathers no integers on a CPU
                everyone = self.group.all_gather(mine, dim=1).view(torch.int32)
                self.indices[:, first : first + self.shape.num_sets(rule)] = everyone
