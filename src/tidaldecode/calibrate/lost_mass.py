"""How much attention each head of each layer would lose by reading the tokens that a layer below chose.

With `p_j[h]` the probabilities of query head `h` of layer `j` in one decode step, and `S_i[s]` a set of tokens that
layer `i < j` chooses, the lost mass is

    lost[j, i, s, h] = 1 - sum of p_j[h, t] over t in S_i[s]

averaged over the steps. Unlike recall (`tidaldecode.calibrate.coherence`) it is not relative to the best choice: a head
that no choice of so many tokens serves well loses much by all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.calibrate.observed import ObservedAttention, ObservedLayer, observe_steps
from tidaldecode.calibrate.prompts import Prompt
from tidaldecode.models.architecture import model_shape
from tidaldecode.plan import ModelShape, Selection

_MOST_ENTRIES = 2**26  # of the probabilities that are looked up at once


@dataclass(frozen=True)
class LostMass:
    """Lost mass between the layers of a model.

    Attributes:
        sets: rule and head of each of the S sets that a layer chooses.
        values: [L, L, S, Hq], float32, on the CPU: the layer that reads, the layer that chooses, its set, and the query
            head that reads it; infinite where the second is not below the first or one attends to a sliding window.
    """

    sets: tuple[tuple[Selection, int], ...]
    values: Tensor


def measure_lost_mass(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    selections: Sequence[Selection],
    token_budget: int,
    sink_tokens: int,
    recent_tokens: int,
) -> LostMass:
    """Measures lost mass on the decode steps of prompts, with full attention throughout.

    Args:
        model: that read the prompts.
        prompts: their caches stand at their marks again afterwards.
        selections: the rules by which layers choose.
        token_budget, sink_tokens, recent_tokens: of every set.
    """
    shape = model_shape(model.config)
    sets = tuple((rule, head) for rule in selections for head in range(shape.num_sets(rule)))
    size = (shape.num_layers, shape.num_layers, len(sets), shape.num_query_heads)
    total = torch.zeros(size, device=model.device)
    measured = torch.zeros(size[:2], dtype=torch.bool)

    def observe(observed: ObservedLayer) -> None:
        for below, chosen in observed.chosen.items():
            if below < observed.layer:
                measured[observed.layer, below] = True
                total[observed.layer, below] += _lost(observed, [chosen[rule] for rule in selections])

    attention = ObservedAttention(shape, selections, token_budget, sink_tokens, observe, recent_tokens)
    for prompt in prompts:
        with torch.inference_mode():
            observe_steps(model, prompt.cache, prompt.steps[:, :-1], attention)
        prompt.cache.go_back(prompt.mark)
    steps = sum(len(prompt.log_probs) for prompt in prompts)
    return LostMass(sets, (total / steps).cpu().masked_fill(~measured[..., None, None], torch.inf))


def _lost(observed: ObservedLayer, chosen: list[Tensor]) -> Tensor:
    """The mass that each head loses by each of the sets [n, sets, k], summed over the steps: [S, Hq]."""
    indices = torch.cat(chosen, 1).long()  # [n, S, k]
    steps, sets, width = indices.shape
    beyond = torch.arange(width, device=indices.device) >= observed.counts[:, None, None]
    heads = torch.split(observed.probabilities, max(1, _MOST_ENTRIES // indices.numel()), 1)
    lost = []
    for probabilities in heads:  # [n, m, T]
        spread = indices.flatten(1)[:, None].expand(-1, probabilities.shape[1], -1)
        rows = probabilities.gather(2, spread).view(steps, -1, sets, width)
        lost.append((1 - rows.masked_fill(beyond[:, None], 0).sum(3)).clamp(min=0).sum(0))  # [m, S]
    return torch.cat(lost).T


def best_sets(lost: LostMass, shape: ModelShape, per_query_head: bool) -> tuple[Tensor, Tensor]:
    """For each pair of layers and each reader the set that loses least.

    Args:
        lost: see `measure_lost_mass`.
        shape: of the model.
        per_query_head: whether each query head reads a set of its own, or the query heads of a KV head read one, so
            that each row of K and V is read once for all of them.

    Returns:
        What is lost, and the set's place in `lost.sets`, [L, L, R]: R is Hq or Hkv; masses of heads are added up.
    """
    size = 1 if per_query_head else shape.group_size
    values = lost.values.view(*lost.values.shape[:3], -1, size).sum(4)  # [L, L, S, R]
    least = values.min(2)
    return least.values, least.indices
