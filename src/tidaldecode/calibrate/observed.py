"""Full attention that is watched: the probabilities of every layer, and the tokens that each layer would choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode import ops
from tidaldecode.evaluate.scoring import step_logits
from tidaldecode.hf import TidalCache
from tidaldecode.ops import KV, Choice
from tidaldecode.plan import ModelShape, Selection

_MOST_BYTES = 2**29  # of the index sets of all layers, which wait for the layers above


@dataclass(frozen=True)
class ObservedLayer:
    """One layer in one pass of n decode steps.

    Attributes:
        layer: index of the layer.
        probabilities: [n, Hq, T], float32 or float64; `p[h] = softmax(s[h])` of each step, zero past its length. They
            are the layer's alone: the next layer's take their place.
        chosen: the tokens that this layer and each one below it would choose, by layer and rule:
            [n, sets, k], int32; sets are Hq (`per_head`), Hkv (`per_group`) or 1 (`unified`).
        counts: [n], int32; valid entries of each of a step's sets.
    """

    layer: int
    probabilities: Tensor
    chosen: Mapping[int, Mapping[Selection, Tensor]]
    counts: Tensor

    def averaged(self, num_sets: int) -> Tensor:
        """The mean of `p[h]` over the query heads of each set, [n, num_sets, T]: what a rule chooses by."""
        steps, _, tokens = self.probabilities.shape
        return self.probabilities.view(steps, num_sets, -1, tokens).mean(2)

    def mass(self, probabilities: Tensor, indices: Tensor) -> Tensor:
        """The sum of probabilities over index sets.

        Args:
            probabilities: [n, S, T].
            indices: [n, S, k], int32; of one layer and rule in `chosen`, expanded over S where heads share a set.

        Returns:
            [n, S].
        """
        beyond = torch.arange(indices.shape[2], device=indices.device) >= self.counts[:, None, None]
        return probabilities.gather(2, indices.long()).masked_fill(beyond, 0).sum(2)


class ObservedAttention:
    """Full attention in every layer; an observer is shown each layer of each step, in order.

    What a layer would choose is what a `select` layer of a plan chooses: `token_budget` tokens, the sinks and the
    recent ones always among them. Hidden states are full attention's. Of all that is observed, the index sets alone are
    kept until the pass ends; scores and probabilities are one layer's.

    Args:
        shape: heads and layers of the model.
        selections: the rules by which tokens are chosen.
        token_budget: tokens of each set; at least `sink_tokens + recent_tokens + 1`.
        sink_tokens: first tokens that are always chosen.
        observe: called with each layer that attends to the whole context.
        recent_tokens: last tokens that are always chosen, the new one among them.
    """

    def __init__(
        self,
        shape: ModelShape,
        selections: Sequence[Selection],
        token_budget: int,
        sink_tokens: int,
        observe: Callable[[ObservedLayer], None],
        recent_tokens: int = 1,
    ) -> None:
        self.shape = shape
        self.selections = tuple(selections)
        self.token_budget = token_budget
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self._observe = observe
        self._chosen: dict[int, dict[Selection, Tensor]] = {}
        self._capacity = 0

    def prepare(self, layer: int, kv: KV) -> None:
        """Nothing is kept beside the cache."""

    def begin(self, lengths: Tensor, capacity: int) -> None:
        """Forgets what the layers of the pass before chose."""
        self._chosen, self._capacity = {}, capacity

    def attend(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """Attention of the new tokens in one layer; arguments and result as in `DecodeAttention.attend`."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = query.new_empty(len(query), self.shape.num_query_heads, self._capacity, dtype=dtype)
        output = ops.full_attention_with_importance(query, kv, scale, ["per_head"], scores)
        lengths = kv.lengths
        past = torch.arange(self._capacity, device=lengths.device) >= lengths[:, None]
        probabilities = scores.masked_fill_(past[:, None], -torch.inf).softmax(-1)
        counts = lengths.clamp(max=self.token_budget)
        observed = ObservedLayer(layer, probabilities, self._chosen, counts)
        self._chosen[layer] = {
            rule: self._choose(scores if rule == "per_head" else observed.averaged(self.shape.num_sets(rule)), lengths)
            for rule in self.selections
        }
        self._observe(observed)
        return output

    def _choose(self, importance: Tensor, lengths: Tensor) -> Tensor:
        """The index sets that importances [n, sets, T] choose, [n, sets, k]."""
        steps, sets, _ = importance.shape
        indices = lengths.new_zeros(steps, sets, min(self.token_budget, self._capacity))
        choice = Choice.alike(lengths, self.token_budget, self.recent_tokens, self.sink_tokens)
        ops.select_tokens(importance, lengths, choice, indices)
        return indices

    def is_full(self, layer: int) -> bool:
        """No layer is: each of them chooses."""
        return False

    def tokens_read(self, context: int) -> dict[int, float]:
        """Every layer reads everything."""
        return dict.fromkeys(range(self.shape.num_layers), context)

    def kv_read_fraction(self, context: int) -> float:
        """Everything."""
        return 1.0


def observe_steps(model: PreTrainedModel, cache: TidalCache, token_ids: Tensor, attention: ObservedAttention) -> None:
    """Runs the decode steps of given tokens under full attention that is watched.

    Args:
        model: with a plan applied.
        cache: holds one prompt, read by the model; afterwards the tokens, too. Its attention is replaced.
        token_ids: [1, n]; the tokens of the steps.
        attention: sees so many of the steps at once as memory allows.

    Raises:
        InputError: as `tidaldecode.evaluate.scoring.step_logits`.
    """
    cache.attention = attention
    sets = sum(map(attention.shape.num_sets, attention.selections))
    width = min(attention.token_budget, cache.capacity)
    steps = max(1, _MOST_BYTES // (4 * attention.shape.num_layers * sets * width))
    for part in torch.split(token_ids, steps, 1):
        for _ in step_logits(model, cache, part):
            pass
