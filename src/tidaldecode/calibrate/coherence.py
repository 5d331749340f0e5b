"""Coherence of layers: how much of what a layer attends to, an earlier layer's choice of tokens covers.

TidalDecode (arXiv 2410.05076) rests on it: the tokens with the highest attention scores are nearly the same in
neighbouring layers. In one decode step let `p_j[s, t]` be the probabilities of layer `j`, averaged over the query heads
of set `s` (one head, the heads of a KV head, or all heads, as the rule of selection says), and `S_i[s]` the `k` tokens
that layer `i` chooses for set `s`. Then

    recall[i, j, s] = sum of p_j[s, t] over t in S_i[s]  /  sum of p_j[s, t] over t in S_j[s]

for `i <= j`: of the mass that layer `j` would read by its own choice, the share that it reads by layer `i`'s. Tokens
of `S_i` that are not in `S_j` count with what mass they have. `S_j` is the best choice there is, so recall is at most
1, and 1 where `i = j`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.calibrate.coherence_settings import CoherenceSettings
from tidaldecode.calibrate.observed import ObservedAttention, ObservedLayer, observe_steps
from tidaldecode.hf import TidalCache, apply
from tidaldecode.models.architecture import model_shape
from tidaldecode.models.chosen import ModelOptions
from tidaldecode.plan import Selection
from tidaldecode.plans.find import find_plan
from tidaldecode.results.environment import environment
from tidaldecode.texts.text import Text, TextSource
from tidaldecode.texts.windows import read_prompt
from tidaldecode.whole_file import make_results_folder, whole_file


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


@dataclass(frozen=True)
class CoherenceReport:
    """Coherence, and what it was measured on.

    Attributes:
        environment: command, versions, device.
        text: name of the text.
        seconds: without loading.
        figure: heatmaps of recall, a PNG file, if it was written.
        distance_figure: recall over the distance between layers, likewise.
    """

    environment: dict[str, object]
    model: str
    dtype: str
    text: str
    settings: CoherenceSettings
    seconds: float
    coherence: Coherence
    figure: str | None = None
    distance_figure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object; `recall` and `distance` are those of the first rule."""
        settings = asdict(self.settings)
        matrices, distances = self.coherence.matrices, self.coherence.distances
        first = self.settings.selections[0]
        return {
            **self.environment,
            "model": self.model,
            "dtype": self.dtype,
            "text": self.text,
            **settings.pop("windows"),
            **settings,
            "budget": self.settings.tokens,
            "seconds": self.seconds,
            "recall": matrices[first],
            "recalls": matrices,
            "distance": distances[first],
            "distances": distances,
            "figure": self.figure,
            "distance_figure": self.distance_figure,
        }

    def save(self, path: Path) -> None:
        """Writes the report as JSON, a line a key; an existing file stays whole until the new one is complete."""
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in self.to_json().items())
        with whole_file(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def report_coherence(
    model: ModelOptions,
    source: TextSource,
    settings: CoherenceSettings,
    results: Path | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> CoherenceReport:
    """Loads a model and a text, and measures coherence.

    Args:
        results: a JSON file for the report, whose folder is made; the figures that it names, beside it, are left to
            the caller.
        on_progress: see `coherence`; 0 of 0 while something is loaded.

    Raises:
        InputError: see `coherence`; or something can't be loaded or written.
    """
    chosen = model.find()
    settings.check(chosen.config)
    on_progress(0, 0, "reading the text")
    text = Text.tokenize(chosen.files.tokenizer(), source.parts())
    settings.windows.check_text(text)
    if results is not None:
        make_results_folder("--output", results)
    on_progress(0, 0, "loading the model")
    torch.manual_seed(settings.seed)
    loaded = apply(chosen.load(), "full")
    began = time.perf_counter()
    found = coherence(loaded, text, settings, on_progress)
    report = CoherenceReport(
        environment=environment(chosen.device),
        model=chosen.files.title,
        dtype=chosen.dtype_name,
        text=source.title,
        settings=settings,
        seconds=round(time.perf_counter() - began, 3),
        coherence=found,
        figure=None if results is None else str(results.with_name("coherence.png")),
        distance_figure=None if results is None else str(results.with_name("coherence_distance.png")),
    )
    if results is not None:
        report.save(results)
    return report


def coherence(
    model: PreTrainedModel,
    text: Text,
    settings: CoherenceSettings,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
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
    cache = TidalCache(model.config, find_plan("full", model.config), windows.context)
    measured = []
    for number, start in enumerate(windows.starts):
        on_progress(number, windows.windows, f"window {number + 1} of {windows.windows}")
        rest = read_prompt(model, cache, text.window(start, windows.context), windows.decode)
        measured.append(
            recall_of_steps(model, cache, rest[:, :-1], settings.selections, settings.tokens, settings.sink_tokens)
        )
    on_progress(windows.windows, windows.windows, "done")
    return Coherence({rule: torch.stack([recall[rule] for recall in measured]) for rule in settings.selections})


def recall_of_steps(
    model: PreTrainedModel,
    cache: TidalCache,
    token_ids: Tensor,
    selections: Sequence[Selection],
    budget: int,
    sink_tokens: int = 0,
) -> dict[Selection, Tensor]:
    """Recall between layers, averaged over the decode steps of given tokens.

    Args:
        model: with a plan applied.
        cache: holds one prompt, read by the model; afterwards the tokens, too. Its attention is replaced.
        token_ids: [1, n]; the tokens of the steps.
        selections, budget, sink_tokens: as in `CoherenceSettings`; a context no longer than the budget is chosen whole.

    Returns:
        For each rule [layers, layers, sets], float64, on the CPU; NaN as in `Coherence`.

    Raises:
        InputError: as `tidaldecode.evaluate.scoring.step_logits`.
    """
    shape = model_shape(model.config)
    size = (shape.num_layers, shape.num_layers)
    totals = {
        rule: torch.zeros(*size, shape.num_sets(rule), dtype=torch.float64, device=model.device) for rule in selections
    }
    measured = torch.zeros(*size, dtype=torch.bool)

    def observe(observed: ObservedLayer) -> None:
        measured[list(observed.chosen), observed.layer] = True
        for rule, total in totals.items():
            _add_recall(observed, rule, total)

    observe_steps(model, cache, token_ids, ObservedAttention(shape, selections, budget, sink_tokens, observe))
    unmeasured = ~measured[..., None]
    return {
        rule: (total / token_ids.shape[1]).cpu().masked_fill(unmeasured, torch.nan) for rule, total in totals.items()
    }


def _add_recall(observed: ObservedLayer, rule: Selection, total: Tensor) -> None:
    """Adds each step's recall of a layer by its own choice and by those of the layers below: column of `total`."""
    probabilities = observed.averaged(total.shape[2])
    own = observed.mass(probabilities, observed.chosen[observed.layer][rule])  # [n, sets]
    for below, chosen in observed.chosen.items():
        recall = observed.mass(probabilities, chosen[rule]) / own
        total[below, observed.layer] += recall.clamp(max=1).sum(0, dtype=torch.float64)  # sums round differently
