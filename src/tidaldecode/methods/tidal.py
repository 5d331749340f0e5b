"""TidalDecode by a plan: a layer's role becomes an operation, and the chosen tokens pass between layers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.errors import InputError
from tidaldecode.methods.method import Method
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.reads import LayerReads
from tidaldecode.methods.step_sets import StepSets, choice_like, write_budgets
from tidaldecode.models import check_plan
from tidaldecode.ops import KV, Choice
from tidaldecode.ops.values import code_share
from tidaldecode.plan import ModelShape, Selection, Source, TidalPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Tidal(Method):
    """TidalDecode by a plan.

    Attributes:
        budget: default: the plan's own (a fraction is rounded as if it were given here).
        plan: what each layer does.
    """

    name = "tidal"
    plan: TidalPlan = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.plan is None:
            raise InputError("method 'tidal' needs a plan")
        super().__post_init__()

    @property
    def token_budget(self) -> int | float:
        """The budget, or the plan's own where none is given."""
        return self.plan.token_budget if self.budget is None else self.budget

    @property
    def kind(self) -> str:
        """The plan's name."""
        return self.plan.name or "plan"

    def settings(self) -> dict[str, str | int | None]:
        """The plan's name and its digest, which tells plans of one name apart, whatever budget they are given."""
        return {"plan": self.kind, "plan_digest": _digest(self.plan)}

    def check(self, config: PreTrainedConfig) -> None:
        """See `Method`."""
        check_plan(self.plan, config)

    def whole_tokens(self, context: int) -> int:
        """See `Method`; a plan knows how many tokens it needs beside its sinks and recent ones."""
        budget = self.token_budget
        return self.plan.with_budget(budget).budget_for(context) if isinstance(budget, float) else budget

    def reading(self, shape: ModelShape, tokens: int) -> Attention:
        """See `Method`."""
        return DecodeAttention(self.plan.with_budget(tokens), shape)

    def sets_per_kv_head(self, shape: ModelShape) -> float:
        """See `Method`."""
        return self.plan.sets_per_kv_head(shape)


class DecodeAttention(Attention):
    """Runs a plan's attention, layer by layer, one decode step after another.

    The index sets that a step's `select` layers choose lie in one table, [B, num_sets, width]; a sparse layer reads it
    through a constant map from its heads to rows of the table.

    Args:
        plan: what each layer does.
        shape: heads and layers of the model.
        heads: the query heads that attend here, whole groups of them; the others' sets have rows in the table, too.
            Default: all.

    Attributes:
        indices: the table of index sets, [B, num_sets, width], int32; `None` before the first step.
        writes: the rules of the sets that each layer chooses.
        budgets: for each of the different budgets of those layers one that has it, the smallest budget first.
        counts: valid entries of a sequence's sets, the tokens that its sparse layers read, int32: [B] where all budgets
            are the same, else [B, num_sets].
    """

    def __init__(self, plan: TidalPlan, shape: ModelShape, heads: range | None = None) -> None:
        self.plan = plan
        self.shape = shape
        self.heads = range(shape.num_query_heads) if heads is None else heads
        sources = {layer: plan.sources_of(layer, shape) for layer in plan.reading}
        writes = _writes(sources)
        # sets of one budget lie together in the table
        self.writes = dict(sorted(writes.items(), key=lambda layer: plan.budget_of(layer[0])))
        self.budgets = tuple({plan.budget_of(layer): layer for layer in self.writes}.values())
        self._first_row = _first_rows(self.writes, shape)
        self._sets = {layer: sum(map(shape.num_sets, rules)) for layer, rules in self.writes.items()}
        self.num_sets = sum(self._sets.values())
        self._sets_of_budget = self._by_budget() if len(self.budgets) > 1 else ()
        self._sources = {layer: of_all[self.heads.start : self.heads.stop] for layer, of_all in sources.items()}
        self._read_layers = {layer: {source.layer for source in of_mine} for layer, of_mine in self._sources.items()}
        self.head_to_set = {layer: self._map(of_mine) for layer, of_mine in self._sources.items()}
        self._in_order = {layer: part for layer, rows in self.head_to_set.items() if (part := _as_slice(rows.tolist()))}
        self.indices: Tensor | None = None
        self.counts: Tensor | None = None
        self._capacity = 0
        self._choices: tuple[Choice, ...] = ()

    def _by_budget(self) -> tuple[slice, ...]:
        """The rows of the table that the sets of each budget lie in."""
        ends, last = [], 0
        for budget in (self.plan.budget_of(layer) for layer in self.budgets):
            last += sum(number for layer, number in self._sets.items() if self.plan.budget_of(layer) == budget)
            ends.append(last)
        return tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False))

    def _map(self, sources: Sequence[Source]) -> Tensor:
        """Rows of the table that the heads read, in the shortest form that `sparse_attention` takes."""
        rows = [self._first_row[source.layer, source.selection] + source.head for source in sources]
        if len(set(rows)) == 1:
            return torch.tensor(rows[:1])
        groups = [rows[start : start + self.shape.group_size] for start in range(0, len(rows), self.shape.group_size)]
        if all(len(set(group)) == 1 for group in groups):
            return torch.tensor([group[0] for group in groups])
        return torch.tensor(rows)

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """See `Attention`; the capacity sizes the table, once."""
        table = self.indices
        if (
            table is None
            or table.shape[0] != len(lengths)
            or table.device != lengths.device
            or capacity > self._capacity
        ):
            self._use(self._allocate(len(lengths), capacity, lengths.device), capacity)
        self._count(lengths)

    def _allocate(self, rows: int, capacity: int, device: torch.device) -> StepSets:
        """Room for the sets of a step of `rows` sequences."""
        with torch.inference_mode(False):
            lengths = torch.zeros(rows, dtype=torch.int32, device=device)
            choices = [choice_like(self.plan, lengths, layer) for layer in self.budgets or (None,)]
            return StepSets.room(lengths, self.num_sets, self.width(self.writes, capacity), *choices)

    def width(self, layers: Iterable[int], capacity: int) -> int:
        """The most tokens of a set of some layers, where no sequence becomes longer than the capacity."""
        return min(max((self.plan.budget_for(capacity, layer) for layer in layers), default=1), capacity)

    def _use(self, sets: StepSets, capacity: int) -> None:
        """Where this step's sets go."""
        if self.indices is None or self.indices.device != sets.indices.device:
            self.head_to_set = {layer: rows.to(sets.indices.device) for layer, rows in self.head_to_set.items()}
        self.indices, self.counts = sets.indices, sets.counts
        self._choices, self._capacity = sets.choices, capacity

    def _count(self, lengths: Tensor) -> None:
        """How many tokens the sets of each sequence hold."""
        for layer, choice in zip(self.budgets, self._choices, strict=bool(self.budgets)):
            write_budgets(self.plan, lengths, choice, layer)
        self._step_sets().count(lengths, self._sets_of_budget)

    def _step_sets(self) -> StepSets:
        assert self.indices is not None and self.counts is not None
        return StepSets(self.indices, self.counts, self._choices)

    def choice_of(self, layer: int) -> Choice:
        """What a layer chooses for each sequence of the step."""
        budgets = [self.plan.budget_of(other) for other in self.budgets]
        return self._choices[budgets.index(self.plan.budget_of(layer))]

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """See `Attention`; by the layer's role."""
        if self._chooses_by_codes(layer):
            self._choose_by_codes(layer, query, kv, scale)
        if layer in self._sources:
            rows, sets, counts = self._sets_of(layer)
            return ops.sparse_attention(query, kv, sets, counts, rows, scale)
        if self.is_full(layer):
            return ops.full_attention(query, kv, scale)
        return self._select(layer, query, kv, scale)

    def _select(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """Full attention that writes the layer's rows of the table."""
        written, choice = self._written_by(layer), self.choice_of(layer)
        return ops.full_attention_with_selection(query, kv, scale, self.writes[layer], choice, self._capacity, written)

    def _choose_by_codes(self, layer: int, query: Tensor, kv: KV, scale: float) -> None:
        """Writes the layer's rows of the table by codes of keys."""
        written, choice = self._written_by(layer), self.choice_of(layer)
        ops.choose_by_codes(query, kv, scale, self.writes[layer], choice, self._capacity, written)

    def _written_by(self, layer: int) -> Tensor:
        """The rows of the table that a select layer writes, [B, S, width]; its rules' sets in order."""
        assert self.indices is not None
        first = self._first_row[layer, self.writes[layer][0]]
        return self.indices[:, first : first + self._sets[layer], : self.width([layer], self._capacity)]

    def code_bits(self, layer: int) -> int:
        """See `Attention`; a layer whose choice nobody reads needs no codes."""
        return (self.plan.key_bits or 0) if self._chooses_by_codes(layer) else 0

    def _chooses_by_codes(self, layer: int) -> bool:
        return self.plan.roles[layer] == "quantized_select" and layer in self.writes

    def is_full(self, layer: int) -> bool:
        """Whether a layer reads the whole cache and chooses nothing: a select layer whose sets nobody reads, too."""
        return self.plan.roles[layer] in ("full", "select") and not self.writes.get(layer)

    def _sets_of(self, layer: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """The table, the map into it and the counts; a part of them without a map where the heads read it in order."""
        assert self.indices is not None and self.counts is not None
        width = self.width(self._read_layers[layer], self._capacity)
        if layer not in self._in_order:
            return self.head_to_set[layer], self.indices[:, :, :width], self.counts
        rows = self._in_order[layer]
        return None, self.indices[:, rows, :width], self.counts[:, rows] if self._sets_of_budget else self.counts

    # ---- what a step reads

    def tokens_read(self, context: int) -> dict[int, float]:
        """See `Attention`: of the layers with a role."""
        layers = (layer for layer, role in enumerate(self.plan.roles) if role is not None)
        return {layer: float(self.reads(layer).tokens(np.array([context]))[0]) for layer in layers}

    def reads(self, layer: int) -> LayerReads:
        """What a layer with a role reads."""
        sources = self._sources.get(layer, ())
        group = self.shape.group_size
        groups = -(-len(sources) // group)  # a rank may have a part of one
        sets: Counter[tuple[int | float, int]] = Counter()
        for start in range(0, len(sources), group):
            for source in set(sources[start : start + group]):
                sets[self.plan.budget_of(source.layer), self.plan.budget_for(1, source.layer)] += 1
        budgets = tuple((*budget, number / groups) for budget, number in sorted(sets.items()))
        bits = (self.plan.key_bits or 0) if self._chooses_by_codes(layer) else 0
        return LayerReads(budgets, code_share(bits, self.shape.head_dim))


def _digest(plan: TidalPlan) -> str:
    """Of everything that decides what a plan reads, but its budget."""
    left_out = {"name", "origin", "calibration", "model"}
    if plan.budgets is None:  # else they count by what they are of it
        left_out |= {"token_budget", "budgets"}
    if plan.drafting == "plan":  # results that are older than the choice keep their digests
        left_out.add("drafting")
    if plan.key_bits is None:
        left_out.add("key_bits")
    rules = plan.model_dump_json(exclude=left_out)
    return hashlib.sha256(rules.encode()).hexdigest()[:12]


def _as_slice(rows: list[int]) -> slice | None:
    """Rows that follow each other, as a slice."""
    part = slice(rows[0], rows[0] + len(rows))
    return part if rows == list(range(part.start, part.stop)) else None


def _writes(sources: Mapping[int, Sequence[Source]]) -> dict[int, list[Selection]]:
    """The rules by which each select layer chooses: those that a sparse layer reads."""
    writes: dict[int, list[Selection]] = {}
    for source in (source for layer in sources.values() for source in layer):
        rules = writes.setdefault(source.layer, [])
        if source.selection not in rules:
            rules.append(source.selection)
    return writes


def _first_rows(writes: dict[int, list[Selection]], shape: ModelShape) -> dict[tuple[int, Selection], int]:
    """Where the sets of a layer and rule begin in the table; the rules of a layer lie together, in order."""
    first: dict[tuple[int, Selection], int] = {}
    row = 0
    for layer, rules in writes.items():
        for rule in rules:
            first[layer, rule] = row
            row += shape.num_sets(rule)
    return first
