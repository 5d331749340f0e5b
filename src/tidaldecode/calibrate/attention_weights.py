"""The attention weights of every layer in decode steps, and the sets of tokens that each layer would choose by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.calibrate.stretches import Stretch
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models import model_shape
from tidaldecode.ops import KV, Choice
from tidaldecode.plan import ModelShape, Selection, TidalPlan
from tidaldecode.rules import PER_HEAD, RULES

_MOST_BYTES = 2**29  # of the index sets of all layers, which wait for the layers above


@dataclass(frozen=True)
class ChosenSets:
    """The sets of tokens that a layer chooses, as a `select` layer of a plan does.

    Attributes:
        selections: the rules by which tokens are chosen; each has sets of its own.
        token_budget: tokens of each set; at least `sink_tokens + recent_tokens + 1`.
        sink_tokens, recent_tokens: first and last tokens that are always chosen, the new one among them.
        key_bits: bits of the codes that choose, as in a `quantized_select` layer; 0 chooses by exact scores.
    """

    selections: tuple[Selection, ...]
    token_budget: int
    sink_tokens: int = 0
    recent_tokens: int = 1
    key_bits: int = 0

    def of(self, shape: ModelShape) -> tuple[tuple[Selection, int], ...]:
        """Rule and head of each set."""
        return tuple((rule, head) for rule in self.selections for head in range(shape.num_sets(rule)))


@dataclass(frozen=True)
class LayerWeights:
    """The attention weights of one layer in one pass of n decode steps.

    Attributes:
        layer: index of the layer.
        weights: [n, Hq, T], float32 or float64; `p[h] = softmax(s[h])` of each step, zero past its length. They are the
            layer's alone: the next layer's take their place.
        chosen: the tokens that this layer and each one below it would choose, by layer and rule:
            [n, sets, k], int32; sets are Hq (`per_head`), Hkv (`per_group`) or 1 (`unified`).
        counts: [n], int32; valid entries of each of a step's sets.
    """

    layer: int
    weights: Tensor
    chosen: Mapping[int, Mapping[Selection, Tensor]]
    counts: Tensor

    def averaged(self, num_sets: int) -> Tensor:
        """The mean of `p[h]` over the query heads of each set, [n, num_sets, T]: what a rule chooses by."""
        steps, _, tokens = self.weights.shape
        return self.weights.view(steps, num_sets, -1, tokens).mean(2)

    def mass(self, weights: Tensor, indices: Tensor) -> Tensor:
        """The sum of weights over index sets.

        Args:
            weights: [n, ..., T].
            indices: [n, ..., k], int32; in `chosen`. Dimensions between the first and the last are broadcast.

        Returns:
            [n, ...].
        """
        size = torch.broadcast_shapes(weights.shape[:-1], indices.shape[:-1])  # type: ignore[no-untyped-call]
        rows = weights.expand(*size, -1).gather(-1, indices.long().expand(*size, -1))
        counts = self.counts.view(-1, *[1] * len(size))
        return rows.masked_fill(torch.arange(rows.shape[-1], device=rows.device) >= counts, 0).sum(-1)


class AttentionWithWeights(DecodeAttention):
    """Full attention in every layer, whose weights, and what the layer would choose, are shown.

    Hidden states are full attention's. Of all that is shown, the index sets alone are kept until the pass ends; scores
    and weights are one layer's.

    Args:
        shape: heads and layers of the model.
        sets: what each layer chooses.
        show: called with each layer that attends to the whole context, in order.
    """

    def __init__(self, shape: ModelShape, sets: ChosenSets, show: Callable[[LayerWeights], None]) -> None:
        super().__init__(TidalPlan.full(shape.num_layers), shape)
        self.chosen_sets = sets
        self._show = show
        self._chosen: dict[int, dict[Selection, Tensor]] = {}

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Forgets what the layers of the pass before chose."""
        self._chosen, self._capacity = {}, capacity

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """Attention of the new tokens in one layer; arguments and result as in `DecodeAttention.attend`."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = query.new_empty(len(query), self.shape.num_query_heads, self._capacity, dtype=dtype)
        output = ops.full_attention_with_importance(query, kv, scale, [PER_HEAD.name], scores)
        lengths = kv.lengths
        past = torch.arange(self._capacity, device=lengths.device) >= lengths[:, None]
        weights = scores.masked_fill_(past[:, None], -torch.inf).softmax(-1)
        shown = LayerWeights(layer, weights, self._chosen, lengths.clamp(max=self.chosen_sets.token_budget))
        if self.chosen_sets.key_bits:
            self._chosen[layer] = self._chosen_by_codes(query, kv, scale)
        else:
            self._chosen[layer] = {rule: self._choose(rule, scores, shown, lengths) for rule in self._rules}
        self._show(shown)
        return output

    def _choose(self, rule: Selection, scores: Tensor, shown: LayerWeights, lengths: Tensor) -> Tensor:
        """The index sets of a rule by exact scores, [n, sets, k]."""
        number = self.shape.num_sets(rule)
        indices = self._room(number, lengths)
        importance = scores if RULES[rule].by_scores else shown.averaged(number)
        ops.select_tokens(importance, lengths, self._choice(lengths), indices)
        return indices

    def _chosen_by_codes(self, query: Tensor, kv: KV, scale: float) -> dict[Selection, Tensor]:
        """The index sets of all rules, [n, sets, k] each."""
        numbers = [self.shape.num_sets(rule) for rule in self._rules]
        indices, choice = self._room(sum(numbers), kv.lengths), self._choice(kv.lengths)
        ops.choose_by_codes(query, kv, scale, self._rules, choice, self._capacity, indices)
        return dict(zip(self._rules, torch.split(indices, numbers, 1), strict=True))

    @property
    def _rules(self) -> tuple[Selection, ...]:
        return self.chosen_sets.selections

    def _room(self, number: int, lengths: Tensor) -> Tensor:
        return lengths.new_zeros(len(lengths), number, min(self.chosen_sets.token_budget, self._capacity))

    def _choice(self, lengths: Tensor) -> Choice:
        sets = self.chosen_sets
        return Choice.alike(lengths, sets.token_budget, sets.recent_tokens, sets.sink_tokens)

    def code_bits(self, layer: int) -> int:
        """See `Attention`."""
        return self.chosen_sets.key_bits

    def is_full(self, layer: int) -> bool:
        """No layer is: each of them chooses."""
        return False


def mean_between_layers(
    stretches: Sequence[Stretch],
    sets: ChosenSets,
    measure: Callable[[LayerWeights], Iterable[tuple[int, Tensor]]],
    unmeasured: float,
) -> Tensor:
    """The mean over decode steps, under full attention, of what is measured between a layer and those that choose.

    Args:
        stretches: whose steps; of one model.
        sets: what each layer chooses.
        measure: of a layer, for each layer that chooses, its index and what is measured, summed over the steps shown.
        unmeasured: stands where nothing was.

    Returns:
        [L, L, ...], on the CPU; the layer that reads, the layer that chooses, and what `measure` gives.
    """
    sums: dict[tuple[int, int], Tensor] = {}

    def add(shown: LayerWeights) -> None:
        for below, value in measure(shown):
            sums[shown.layer, below] = sums.get((shown.layer, below), 0) + value

    shape = model_shape(stretches[0].model.config)
    attention = AttentionWithWeights(shape, sets, add)
    for stretch in stretches:
        width = min(sets.token_budget, stretch.cache.capacity)
        at_once = max(1, _MOST_BYTES // (4 * shape.num_layers * len(sets.of(shape)) * width))
        stretch.run(attention, lambda logits: None, at_once)
    first, steps = next(iter(sums.values())), sum(stretch.steps for stretch in stretches)
    means = torch.full((shape.num_layers, shape.num_layers, *first.shape), unmeasured, dtype=first.dtype)
    for layers, total in sums.items():
        means[layers] = total.cpu() / steps
    return means
