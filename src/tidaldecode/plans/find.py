"""From the name of a plan to the plan for a model."""

from __future__ import annotations

import logging
import re

from transformers import PreTrainedConfig

from tidaldecode.architecture import model_shape, sliding_windows
from tidaldecode.errors import InputError
from tidaldecode.plan import PAPER_RESELECT_LAYERS, TidalPlan
from tidaldecode.plans import read_plan, shipped_plans

_log = logging.getLogger(__name__)


def find_plan(name: str, config: PreTrainedConfig) -> TidalPlan:
    """The plan of a name, for a model.

    Args:
        name: `auto` (the shipped plan made for this model), `paper`, `full` (full attention in every layer), the name
            of a shipped plan, or a plan file.

    Raises:
        InputError: the name is unknown, the file is wrong, or no shipped plan was made for the model.
    """
    windows = sliding_windows(config)
    layers = tuple(layer for layer, window in enumerate(windows) if window is None)
    if name == "full":
        return TidalPlan.full(len(windows), layers)
    if name == "paper":
        return TidalPlan.paper(len(windows), _published_layer(config), global_layers=layers)
    if name == "auto":
        return _shipped_for(config)
    plan = read_plan(name)
    assert plan is not None
    return plan


def _shipped_for(config: PreTrainedConfig) -> TidalPlan:
    shape = model_shape(config)
    for name, plan in shipped_plans().items():
        made_for = plan.model
        if made_for is None or made_for.name is None or name != _plain(made_for.name):
            continue  # a variant (the paper's plan for the model, say) is taken only by its name
        if made_for.model_copy(update={"name": shape.name}) == shape and name in _plain(shape.name or ""):
            if plan.calibration is None:
                _log.warning("plan %s: %s; `tidaldecode calibrate` finds and measures one", name, plan.origin)
            return plan
    raise InputError(
        f"no shipped plan was made for {shape.name or 'this model'} ({shape.describe()}): find one with "
        "`tidaldecode calibrate --model ... --output plan.json` and pass its file, or 'paper' for the paper's layers"
    )


def _published_layer(config: PreTrainedConfig) -> int | None:
    name = _plain(config.name_or_path)
    return next((layer for family, layer in PAPER_RESELECT_LAYERS.items() if _plain(family) in name), None)


def _plain(name: str) -> str:
    """A model's name without its case and punctuation: `HuggingFaceTB/SmolLM2-135M` and `smollm2_135m` agree."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())
