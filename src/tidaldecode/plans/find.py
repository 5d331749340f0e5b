"""From the name of a plan to the plan for a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tidaldecode.errors import InputError
from tidaldecode.models import model_shape, sliding_windows
from tidaldecode.plan import TidalPlan, describe_shape, plain_name, published_reselect_layer
from tidaldecode.plans import read_plan, shipped_plans

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
        return TidalPlan.paper(len(windows), published_reselect_layer(config.name_or_path), global_layers=layers)
    if name == "auto":
        return _shipped_for(config)
    plan = read_plan(name)
    assert plan is not None
    return plan


def _shipped_for(config: PreTrainedConfig) -> TidalPlan:
    shape = model_shape(config)
    plan = shipped_for(shape.name, shape.model_dump(exclude={"name"}))
    if plan.calibration is None:
        _log.warning("plan %s: %s; `tidaldecode calibrate` finds and measures one", plan.name, plan.origin)
    return plan


def shipped_for(model: str | None, fields: Mapping[str, int]) -> TidalPlan:
    """The shipped plan made for a model.

    Args:
        model: its name.
        fields: those of its `ModelShape` that are known, its name left out.

    Raises:
        InputError: there is none.
    """
    for name, plan in shipped_plans().items():
        made_for = None if plan.model is None or plan.model.name is None else plain_name(plan.model.name)
        if name != made_for:
            continue  # a variant (the paper's plan for the model, say) is taken only by its name
        if name in plain_name(model or "") and plan.mismatch(fields) is None:
            return plan
    raise InputError(
        f"no shipped plan was made for {model or 'this model'} ({describe_shape(fields)}): find one with "
        "`tidaldecode calibrate --model ... --output plan.json` and pass its file, or 'paper' for the paper's layers"
    )
