"""What each layer of a model does in a decode step: `TidalPlan`, a validated piece of data, saved as JSON."""

from __future__ import annotations

from tidaldecode.plan.calibration import Calibration
from tidaldecode.plan.shape import ModelShape, Selection, Source, describe_shape
from tidaldecode.plan.tidal_plan import (
    KEY_BITS,
    PAPER_RESELECT_LAYERS,
    Role,
    TidalPlan,
    plain_name,
    published_reselect_layer,
    recent_among,
    sets_read,
    tokens_of,
)

__all__ = [
    "KEY_BITS",
    "PAPER_RESELECT_LAYERS",
    "Calibration",
    "ModelShape",
    "Role",
    "Selection",
    "Source",
    "TidalPlan",
    "describe_shape",
    "plain_name",
    "published_reselect_layer",
    "recent_among",
    "sets_read",
    "tokens_of",
]
