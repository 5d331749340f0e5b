"""Gives a loaded Transformers model a plan, and takes it away again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from transformers import PreTrainedModel

from tidaldecode.architecture import check_architecture, check_plan
from tidaldecode.errors import InputError
from tidaldecode.hf.attention_function import NAME
from tidaldecode.hf.forward import tidal_forward
from tidaldecode.hf.generation import tidal_generate, tidal_prepare_inputs
from tidaldecode.hf.weights import forget_weights
from tidaldecode.plan import TidalPlan
from tidaldecode.plans.find import find_plan

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class _Applied:
    """The plan, and what `remove` needs to undo `apply`; bound methods, which a deep copy of the model binds anew."""

    plan: TidalPlan
    forward: Callable[..., Any]
    generate: Callable[..., Any]
    prepare_inputs: Callable[..., Any]
    attn_implementation: str
    cache_implementation: str | None


_REPLACED = {
    "forward": tidal_forward,
    "generate": tidal_generate,
    "prepare_inputs_for_generation": tidal_prepare_inputs,
}


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
        InputError: the architecture is not supported, the model lies on several devices, the plan does not fit the
            model, or it has one already.
    """
    if applied_plan(model) is not None:
        raise InputError("the model has a plan already: call tidaldecode.remove(model) first")
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} does not generate text: load it as a causal language model")
    check_architecture(model.config)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise InputError("the model lies on several devices: load it on one (device_map of one device)")
    if not isinstance(plan, TidalPlan):
        plan = find_plan(plan, model.config)
    check_plan(plan, model.config)
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(f"{type(model).__name__} does not take attention functions: it can't work with tidaldecode")
    model._tidaldecode = _Applied(
        plan=plan,
        forward=model.forward,
        generate=model.generate,
        prepare_inputs=model.prepare_inputs_for_generation,
        attn_implementation=previous,
        cache_implementation=model.generation_config.cache_implementation,
    )
    model.generation_config.cache_implementation = None  # some checkpoints ask for a cache of Transformers'
    for name, function in _REPLACED.items():
        setattr(model, name, MethodType(_like(getattr(type(model), name), function), model))
    return model


def _like(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the name and signature of the one that it replaces: Transformers looks at them."""

    @functools.wraps(original)
    def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return method


def remove(model: Model) -> Model:
    """Undoes `apply`: the model attends to everything again, as it did before.

    Raises:
        InputError: the model has no plan.
    """
    applied: _Applied | None = getattr(model, "_tidaldecode", None)
    if applied is None:
        raise InputError("the model has no plan: tidaldecode.apply was not called on it")
    before = dict(zip(_REPLACED, (applied.forward, applied.generate, applied.prepare_inputs), strict=True))
    for name, method in before.items():
        delattr(model, name)
        if getattr(model, name) != method:  # it was the model's own, not its class's
            setattr(model, name, method)
    del model._tidaldecode
    forget_weights(model)
    model.generation_config.cache_implementation = applied.cache_implementation
    model.set_attn_implementation(applied.attn_implementation)
    return model


def applied_plan(model: PreTrainedModel) -> TidalPlan | None:
    """The plan that the model decodes by, or `None`."""
    applied: _Applied | None = getattr(model, "_tidaldecode", None)
    return None if applied is None else applied.plan
