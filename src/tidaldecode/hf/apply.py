"""Gives a loaded Transformers model a plan, and takes it away again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedModel

from tidaldecode.errors import InputError
from tidaldecode.hf.architecture import check_architecture, check_plan
from tidaldecode.hf.attention_function import NAME
from tidaldecode.hf.forward import tidal_forward
from tidaldecode.hf.generation import tidal_generate
from tidaldecode.hf.plans import find_plan
from tidaldecode.plan import TidalPlan

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class _Applied:
    """What `remove` needs to undo `apply`."""

    plan: TidalPlan
    attn_implementation: str
    cache_implementation: str | None


def apply(model: Model, plan: TidalPlan | str = "auto") -> Model:
    """Lets a model decode by a plan. `model.generate` is called as before, and so is `model` itself.

    Prompts are read with full attention, in chunks; each new token then attends by the role of each layer.

    Args:
        model: a causal language model of Transformers, loaded.
        plan: a plan, or the name of one: `auto` (the shipped plan made for this model), `paper`, `full` (full
            attention in every layer), the name of a shipped plan, or a plan file.

    Returns:
        The same model, changed in place; `remove` changes it back.

    Raises:
        InputError: the architecture is not supported, the plan does not fit the model, or the model has one already.
    """
    if applied_plan(model) is not None:
        raise InputError("the model has a plan already: call tidaldecode.remove(model) first")
    check_architecture(model.config)
    if not isinstance(plan, TidalPlan):
        plan = find_plan(plan, model.config)
    check_plan(plan, model.config)
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(f"{type(model).__name__} does not take attention functions: it can't work with tidaldecode")
    model._tidaldecode = _Applied(plan, previous, model.generation_config.cache_implementation)
    model.generation_config.cache_implementation = None  # some checkpoints ask for a cache of Transformers'
    model.forward = tidal_forward(model)
    model.generate = tidal_generate(model, plan)
    return model


def remove(model: Model) -> Model:
    """Undoes `apply`: the model attends to everything again, as it did before.

    Raises:
        InputError: the model has no plan.
    """
    applied: _Applied | None = getattr(model, "_tidaldecode", None)
    if applied is None:
        raise InputError("the model has no plan: tidaldecode.apply was not called on it")
    del model.forward, model.generate, model._tidaldecode
    model.generation_config.cache_implementation = applied.cache_implementation
    model.set_attn_implementation(applied.attn_implementation)
    return model


def applied_plan(model: PreTrainedModel) -> TidalPlan | None:
    """The plan that the model decodes by, or `None`."""
    applied: _Applied | None = getattr(model, "_tidaldecode", None)
    return None if applied is None else applied.plan
