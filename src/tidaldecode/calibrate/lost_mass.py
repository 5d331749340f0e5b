"""How much attention each head of each layer would lose by reading the tokens that a layer below chose.

With `p_j[h]` the attention weights of query head `h` of layer `j` in one decode step, and `S_i[s]` a set of tokens that
layer `i < j` chooses, the lost mass is

    lost[j, i, s, h] = 1 - sum of p_j[h, t] over t in S_i[s]

averaged over the steps. Unlike recall (`tidaldecode.calibrate.coherence`) it is not relative to the best choice: a head
that no choice of so many tokens serves well loses much by all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tidaldecode.calibrate.attention_weights import ChosenSets, LayerWeights, mean_between_layers
from tidaldecode.calibrate.stretches import Stretch

_MOST_ENTRIES = 2**26  # of the weights that are looked up at once


def measure_lost_mass(stretches: Sequence[Stretch], sets: ChosenSets) -> Tensor:
    """Lost mass between the layers of a model, on decode steps.

    Args:
        stretches: whose steps.
        sets: what each layer chooses; S sets in all.

    Returns:
        [L, L, S, Hq], float32, on the CPU: the layer that reads, the layer that chooses, its set, and the query head
        that reads it; infinite where the second is not below the first or one attends to a sliding window. A layer that
        chooses by codes reads its own choice, too.
    """

    def measure(shown: LayerWeights) -> Iterator[tuple[int, Tensor]]:
        for below, chosen in shown.chosen.items():
            if below < shown.layer or (below == shown.layer and sets.key_bits):
                yield below, _lost(shown, torch.cat([chosen[rule] for rule in sets.selections], 1)).float()

    return mean_between_layers(stretches, sets, measure, torch.inf)


def _lost(shown: LayerWeights, indices: Tensor) -> Tensor:
    """The mass that each head loses by each of the sets [n, S, k], summed over the steps: [S, Hq]."""
    heads = torch.split(shown.weights, max(1, _MOST_ENTRIES // indices.numel()), 1)
    lost = [(1 - shown.mass(weights[:, :, None], indices[:, None])).clamp(min=0).sum(0) for weights in heads]
    return torch.cat(lost).T  # of [m, S] each
