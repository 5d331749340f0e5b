"""Gives a loaded Transformers model a plan, and takes it away again."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from tidaldecode.errors import InputError
from tidaldecode.hf.applied import Applied
from tidaldecode.hf.attention_function import NAME
from tidaldecode.hf.planned import REPLACED, plain_class, planned_class
from tidaldecode.hf.weights import forget_weights
from tidaldecode.models import check_architecture, check_plan
from tidaldecode.plan import TidalPlan
from tidaldecode.plans.find import PlanLike, find_plan

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config", PreTrainedConfig, GenerationConfig)

_INSIDE = ("_orig_mod", "base_model", "model")
"""Where a wrapper keeps its model: `torch.compile`'s, a `PeftModel`, and the tuner in that."""


def apply(model: Model, plan: PlanLike = "auto") -> Model:
    """Lets a model decode by a plan. `model.generate` is called as before, and so is `model` itself.

    Prompts are read with full attention, in chunks; each new token then attends by the role of each layer.

    Args:
        model: a causal language model of Transformers, loaded; PEFT or `torch.compile` may have wrapped it.
        plan: a plan, the fields of one, or the name of one: `auto` (the shipped plan made for this model), `paper`,
            `full` (full attention in every layer), the name of a shipped plan, or a plan file.

    Returns:
        The same model, changed in place; `remove` changes it back.

    Raises:
        InputError: the architecture is not supported, the model lies on several devices, the plan does not fit the
            model, or it has one already. The model is then as it was.
    """
    inside = _inside(model)
    if inside is None:
        raise InputError(f"tidaldecode.apply takes a language model of Transformers, not a {type(model).__name__}")
    if applied_plan(inside) is not None:
        raise InputError("the model has a plan already: call tidaldecode.remove(model) first")
    if not inside.can_generate():
        raise InputError(f"{type(inside).__name__} does not generate text: load it as a causal language model")
    check_architecture(inside.config)
    if len(set(getattr(inside, "hf_device_map", {}).values())) > 1:
        raise InputError("the model lies on several devices: load it on one (device_map of one device)")
    found = find_plan(plan, inside.config)
    check_plan(found, inside.config)
    _apply(inside, found)
    return model


def _apply(model: PreTrainedModel, plan: TidalPlan) -> None:
    kind = plain_class(model)
    planned = planned_class(kind)
    shared = model.config  # where its attention is named; other models may have the same object
    _replace_config(model, copy.copy(shared))
    try:
        model.set_attn_implementation({"": NAME})
        if model.config._attn_implementation != NAME:
            raise InputError(f"{kind.__name__} does not take attention functions: it can't work with tidaldecode")
    except BaseException:
        _replace_config(model, _unless_changed(model.config, shared))
        raise
    before = shared._attn_implementation
    model._tidaldecode = Applied(
        plan=plan,
        kind=kind,
        own={name: vars(model).pop(name) for name in REPLACED if name in vars(model)},
        config=shared,
        generation_config=_without_cache(model),
        attn_implementation="sdpa" if before == NAME else before,  # made from the configuration of one with a plan
    )
    model.__class__ = planned


def _without_cache(model: PreTrainedModel) -> GenerationConfig | None:
    """Lets a model ask for no cache of Transformers', as some checkpoints do; what asked for it, if something did."""
    asked = model.generation_config
    if asked.cache_implementation is None:
        return None
    model.generation_config = copy.copy(asked)
    model.generation_config.cache_implementation = None
    return asked


def remove(model: Model) -> Model:
    """Undoes `apply`: the model attends to everything again, as it did before.

    Raises:
        InputError: the model has no plan.
    """
    inside = _inside(model)
    if inside is None or "_tidaldecode" not in vars(inside):
        raise InputError("the model has no plan: tidaldecode.apply was not called on it")
    applied: Applied = inside._tidaldecode
    if inside.config._attn_implementation == NAME:
        applied.kind.set_attn_implementation(inside, {"": applied.attn_implementation})
    _replace_config(inside, _unless_changed(inside.config, applied.config))
    asked = applied.generation_config
    if asked is not None:
        inside.generation_config.cache_implementation = asked.cache_implementation
        inside.generation_config = _unless_changed(inside.generation_config, asked)
    if type(inside) is planned_class(applied.kind):
        inside.__class__ = applied.kind
    vars(inside).update(applied.own)
    del inside._tidaldecode
    forget_weights(inside)
    return model


def applied_plan(model: nn.Module) -> TidalPlan | None:
    """The plan that the model decodes by, or `None`."""
    inside = _inside(model)
    applied: Applied | None = None if inside is None else vars(inside).get("_tidaldecode")
    return None if applied is None else applied.plan


def _inside(model: nn.Module) -> PreTrainedModel | None:
    """The model of Transformers that a model is, or that a wrapper of it holds."""
    while not isinstance(model, PreTrainedModel):
        children = dict(model.named_children()) if isinstance(model, nn.Module) else {}
        inner = next((children[name] for name in _INSIDE if name in children), None)
        if inner is None:
            return None
        model = inner
    return model


def _replace_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Puts a configuration in the place of a model's, in all parts of the model."""
    before = model.config
    for module in model.modules():
        for name, value in vars(module).items():
            if value is before:
                vars(module)[name] = config


def _unless_changed(own: Config, shared: Config) -> Config:
    """The configuration that a copy was made of, or the copy if something else was set in one of them since."""
    return shared if vars(own) == vars(shared) else own  # `==` looks at some of it alone
