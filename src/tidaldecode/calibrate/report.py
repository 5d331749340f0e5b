"""What a calibration found and on what: the plan file that remembers it, and the JSON object of results."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tidaldecode.calibrate.calibration import Found, Point
from tidaldecode.calibrate.settings import CalibrationSettings
from tidaldecode.plan import Calibration, TidalPlan
from tidaldecode.whole_file import whole_file


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration, and what it was made on.

    Attributes:
        environment: command, versions, device.
        text, heldout_text: names of the texts.
        seconds: without loading.
        figure: the frontier of cost and loss, a PNG file, if it was written.
    """

    environment: dict[str, Any]
    model: str
    dtype: str
    text: str
    heldout_text: str
    settings: CalibrationSettings
    seconds: float
    found: Found
    figure: str | None = None

    @property
    def plan(self) -> TidalPlan:
        """The plan that was asked for, with how it was found and what it loses."""
        return self._recorded(self.found.chosen)

    @property
    def sets_per_kv_head(self) -> float:
        """Sets of tokens that the query heads of one KV head read in a sparse layer; each costs a budget."""
        assert self.plan.model is not None
        return self.plan.sets_per_kv_head(self.plan.model)

    def _recorded(self, point: Point) -> TidalPlan:
        settings, checked = self.settings, point.heldout_gap is not None
        calibration = Calibration(
            text=self.text,
            heldout_text=self.heldout_text if checked else None,
            context=settings.context,
            windows=settings.windows,
            decode=settings.decode,
            heldout_windows=settings.heldout_windows if checked else None,
            heldout_decode=settings.heldout_steps if checked else None,
            seed=settings.seed,
            dtype=self.dtype,
            device=self.environment["device"],
            versions=self.environment["versions"],
            loss=_rounded(point.loss.divergence),
            text_divergence=_rounded(point.loss.text_divergence),
            calibration_gap=_rounded(point.loss.gap),
            heldout_gap=None if point.heldout_gap is None else _rounded(point.heldout_gap),
            heldout_error=None if point.heldout_error is None else _rounded(point.heldout_error),
            kv_read_fraction=_rounded(point.kv_read_fraction),
        )
        assert point.plan.model is not None
        shape = point.plan.model.model_copy(update={"name": self.model})
        return point.plan.model_copy(
            update={"origin": "found by tidaldecode calibrate", "model": shape, "calibration": calibration}
        )

    def to_json(self) -> dict[str, Any]:
        """The report as one object; `frontier` holds the best plans, the cheapest first."""
        settings, chosen = asdict(self.settings), self.found.chosen
        return {
            **self.environment,
            "model": self.model,
            "dtype": self.dtype,
            "text": self.text,
            "heldout_text": self.heldout_text,
            **settings,
            "seconds": self.seconds,
            "tried": self.found.tried,
            "stopped": self.found.stopped,
            "loss": chosen.loss.divergence,
            "text_divergence": chosen.loss.text_divergence,
            "calibration_gap": chosen.loss.gap,
            "heldout_gap": chosen.heldout_gap,
            "heldout_error": chosen.heldout_error,
            "kv_read_fraction": chosen.kv_read_fraction,
            "sets_per_kv_head": self.sets_per_kv_head,
            "plan": _written(self.plan),
            "frontier": [
                {
                    "full_layers": point.plan.roles.count("full"),
                    "select_layers": point.plan.roles.count("select"),
                    "token_budget": point.plan.token_budget,
                    "kv_read_fraction": point.kv_read_fraction,
                    "loss": point.loss.divergence,
                    "text_divergence": point.loss.text_divergence,
                    "calibration_gap": point.loss.gap,
                    "heldout_gap": point.heldout_gap,
                    "heldout_error": point.heldout_error,
                    "plan": _written(self._recorded(point)),
                }
                for point in self.found.frontier
            ],
            "figure": self.figure,
        }

    def save(self, path: Path) -> None:
        """Writes the report as JSON, a line a key; an existing file stays whole until the new one is complete."""
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in self.to_json().items())
        with whole_file(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _rounded(value: float) -> float:
    return round(value, 5)


def _written(plan: TidalPlan) -> Any:
    return json.loads(plan.to_json())
