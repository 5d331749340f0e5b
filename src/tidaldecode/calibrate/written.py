"""What is written of a calibration and of coherence: the plan, which remembers how it was found, and the results."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tidaldecode.calibrate.calibration import Found
from tidaldecode.calibrate.coherence import Coherence
from tidaldecode.calibrate.points import Point
from tidaldecode.calibrate.settings import CalibrationSettings, CoherenceSettings
from tidaldecode.plan import Calibration, TidalPlan


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration, and what it was made on.

    Attributes:
        about: as results name it: command, versions, device, model, dtype, `text` and `heldout_text` (names), and
            `seconds`, without loading.
        figure: the frontier of cost and loss, a PNG file, if it is drawn.
    """

    about: dict[str, Any]
    settings: CalibrationSettings
    found: Found
    figure: str | None = None

    @property
    def plan(self) -> TidalPlan:
        """The plan that was asked for, with how it was found and what it loses."""
        return self._plan(self.found.chosen)

    @property
    def sets_per_kv_head(self) -> float:
        """Sets of tokens that the query heads of one KV head read in a sparse layer; each costs a budget."""
        assert self.plan.model is not None
        return self.plan.sets_per_kv_head(self.plan.model)

    def _plan(self, point: Point) -> TidalPlan:
        about, settings, checked = self.about, self.settings, point.heldout_gap is not None
        numbers: dict[str, Any] = {
            name: None if value is None else round(value, 5) for name, value in _numbers(point).items()
        }
        calibration = Calibration(
            text=about["text"],
            heldout_text=about["heldout_text"] if checked else None,
            context=settings.context,
            windows=settings.windows,
            decode=settings.decode,
            heldout_windows=settings.heldout_windows if checked else None,
            heldout_decode=settings.heldout_steps if checked else None,
            seed=settings.seed,
            dtype=about["dtype"],
            device=about["device"],
            versions=about["versions"],
            **numbers,
        )
        assert point.plan.model is not None
        shape = point.plan.model.model_copy(update={"name": about["model"]})
        return point.plan.model_copy(
            update={"origin": "found by tidaldecode calibrate", "model": shape, "calibration": calibration}
        )

    def to_json(self) -> dict[str, Any]:
        """The report as one object; `frontier` holds the best plans, the cheapest first."""
        found = self.found
        return {
            **self.about,
            **self.settings.to_json(),
            "tried": found.tried,
            "stopped": found.stopped,
            **_numbers(found.chosen),
            "sets_per_kv_head": self.sets_per_kv_head,
            "plan": json.loads(self.plan.to_json()),
            "frontier": [
                {
                    "full_layers": point.plan.roles.count("full"),
                    "select_layers": point.plan.roles.count("select"),
                    "quantized_select_layers": point.plan.roles.count("quantized_select"),
                    "token_budget": point.plan.token_budget,
                    **_numbers(point),
                    "plan": json.loads(self._plan(point).to_json()),
                }
                for point in found.frontier
            ],
            "figure": self.figure,
        }


def _numbers(point: Point) -> dict[str, Any]:
    """What a plan loses and reads, as plan files and results name it."""
    return {
        "loss": point.loss.divergence,
        "text_divergence": point.loss.text_divergence,
        "calibration_gap": point.loss.gap,
        "heldout_gap": point.heldout_gap,
        "heldout_error": point.heldout_error,
        "heldout_surprise": point.heldout_surprise,
        "heldout_surprise_error": point.heldout_surprise_error,
        "kv_read_fraction": point.kv_read_fraction,
    }


@dataclass(frozen=True)
class CoherenceReport:
    """Coherence, and what it was measured on.

    Attributes:
        about: as results name it: command, versions, device, model, dtype, `text` (its name), and `seconds`, without
            loading.
        figure: heatmaps of recall, a PNG file, if it is drawn.
        distance_figure: recall over the distance between layers, likewise.
    """

    about: dict[str, Any]
    settings: CoherenceSettings
    coherence: Coherence
    figure: str | None = None
    distance_figure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object; `recall` and `distance` are those of the first rule."""
        settings = asdict(self.settings)
        matrices, distances = self.coherence.matrices, self.coherence.distances
        first = self.settings.selections[0]
        return {
            **self.about,
            **settings.pop("windows"),
            **settings,
            "budget": self.settings.tokens,
            "recall": matrices[first],
            "recalls": matrices,
            "distance": distances[first],
            "distances": distances,
            "figure": self.figure,
            "distance_figure": self.distance_figure,
        }
