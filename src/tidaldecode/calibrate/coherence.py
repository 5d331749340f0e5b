"""Coherence of layers: how much of what a layer attends to, an earlier layer's choice of tokens covers.

TidalDecode (arXiv 2410.05076) rests on it: the tokens with the highest attention scores are nearly the same in
neighbouring layers. In one decode step let `p_j[s, t]` be the attention weights of layer `j`, averaged over the query
heads of set `s` (one head, the heads of a KV head, or all heads, as the rule of selection says), and `S_i[s]` the `k`
tokens that layer `i` chooses for set `s`. Then

    recall[i, j, s] = sum of p_j[s, t] over t in S_i[s]  /  sum of p_j[s, t] over t in S_j[s]

for `i <= j`: of the mass that layer `j` would read by its own choice, the share that it reads by layer `i`'s. Tokens
of `S_i` that are not in `S_j` count with what mass they have. `S_j` is the best choice there is, so recall is at most
1, and 1 where `i = j`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.calibrate.attention_weights import ChosenSets, LayerWeights, mean_between_layers
from tidaldecode.calibrate.settings import CoherenceSettings
from tidaldecode.calibrate.stretches import Stretch
from tidaldecode.evaluate.study import OnProgress, quiet
from tidaldecode.models import model_shape
from tidaldecode.plan import Selection
from tidaldecode.texts.text import Text


@dataclass(frozen=True)
class Coherence:
    """Recall between the layers of a model.

    Attributes:
        recalls: for each rule [windows, layers, layers, sets], float64, on the CPU; the mean over the decode steps of
            a window of `recall[i, j, s]` (see above). NaN where `i > j`, and where a layer attends to a sliding window.
    """

    recalls: dict[Selection, Tensor]

    @property
    def matrices(self) -> dict[str, list[list[float | None]]]:
        """The mean over windows and sets by rule, [layers, layers]: row `i` chooses, column `j` attends."""
        return {
            rule: [[_number(value) for value in row] for row in recall.mean((0, 3)).tolist()]
            for rule, recall in self.recalls.items()
        }

    @property
    def distances(self) -> dict[str, list[float | None]]:
        """The mean over all pairs of layers `j - i` apart by rule, for each distance from 0 on."""
        return {
            rule: [_number(recall.mean((0, 3)).diagonal(apart).nanmean().item()) for apart in range(recall.shape[1])]
            for rule, recall in self.recalls.items()
        }


def _number(value: float) -> float | None:
    """For JSON, in which there is no NaN."""
    return None if math.isnan(value) else round(value, 6)


def coherence(
    model: PreTrainedModel,
    text: Text,
    settings: CoherenceSettings,
    on_progress: OnProgress = quiet,
) -> Coherence:
    """Measures recall between the layers of a model on decode steps of a text, with full attention throughout.

    Args:
        model: with a plan applied (any: every layer reads everything).
        text: long enough, see `Windows.check_text`.
        settings: what is chosen, and where.
        on_progress: told how many windows of how many are done, and in words what comes next.

    Returns:
        Recall by rule, window, pair of layers and set.

    Raises:
        InputError: the text is too short, or the model can't be measured.
    """
    windows = settings.windows
    settings.check(model.config)
    windows.check_text(text)
    measured = []
    for number, start in enumerate(windows.starts):
        on_progress(number, windows.windows, f"window {number + 1} of {windows.windows}")
        stretch = Stretch.read(model, text.window(start, windows.context), windows.decode)
        measured.append(measure_recall(stretch, ChosenSets(settings.selections, settings.tokens, settings.sink_tokens)))
    on_progress(windows.windows, windows.windows, "done")
    return Coherence({rule: torch.stack([found[rule] for found in measured]) for rule in settings.selections})


def measure_recall(stretch: Stretch, sets: ChosenSets) -> dict[Selection, Tensor]:
    """Recall between layers, averaged over decode steps.

    Args:
        stretch: whose steps.
        sets: what each layer chooses; a context no longer than the budget is chosen whole.

    Returns:
        For each rule [layers, layers, sets], float64, on the CPU; NaN as in `Coherence`.
    """
    shape = model_shape(stretch.model.config)
    counts = {rule: shape.num_sets(rule) for rule in sets.selections}

    def measure(shown: LayerWeights) -> Iterator[tuple[int, Tensor]]:
        own = shown.chosen[shown.layer]
        averaged = {rule: shown.averaged(count) for rule, count in counts.items()}
        best = {rule: shown.mass(weights, own[rule]) for rule, weights in averaged.items()}  # [n, sets]
        for below, chosen in shown.chosen.items():
            shares = [shown.mass(averaged[rule], indices) / best[rule] for rule, indices in chosen.items()]
            yield below, torch.cat([share.clamp(max=1).sum(0, dtype=torch.float64) for share in shares])  # may round up

    means = mean_between_layers([stretch], sets, measure, torch.nan).transpose(0, 1)  # [chooses, attends, S]
    return dict(zip(counts, torch.split(means, list(counts.values()), 2), strict=True))
