"""From the name of a plan to the plan for a model."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from tidaldecode.architecture import model_shape, sliding_windows
from tidaldecode.errors import InputError
from tidaldecode.plan import PAPER_RESELECT_LAYERS, TidalPlan
from tidaldecode.plans import read_plan, shipped_plans

PlanLike = TidalPlan | Mapping[str, Any] | str | os.PathLike[str]
"""A plan, the fields of one, the name of one, or its file."""

_log = logging.getLogger(__name__)


def find_plan(plan: PlanLike, config: PreTrainedConfig) -> TidalPlan:
    """The plan that is meant, for a model.

    Args:
        plan: a plan, the fields of one (as in its JSON), its file, or a name: `auto` (the shipped plan made for this
            model), `paper`, `full` (full attention in every layer), or the name of a shipped plan.

    Raises:
        InputError: the name is unknown, the file or a field is wrong, or no shipped plan was made for the model.
    """
    if isinstance(plan, TidalPlan):
        return plan
    if isinstance(plan, Mapping):
        return TidalPlan.validated(**{str(field): value for field, value in plan.items()})
    if isinstance(plan, os.PathLike):
        return TidalPlan.load(plan)
    if not isinstance(plan, str):
        raise InputError(f"a plan is a TidalPlan, its fields, its file or a name, not a {type(plan).__name__}")
    return _plan_of(plan, config)


def _plan_of(name: str, config: PreTrainedConfig) -> TidalPlan:
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
