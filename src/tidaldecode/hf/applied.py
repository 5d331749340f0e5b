"""The plan of a model, and what the model was before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from tidaldecode.plan import TidalPlan


@dataclass(frozen=True)
class Applied:
    """What `apply` leaves at a model, as its `_tidaldecode`.

    No bound method of the model is kept where one can do without: pickle stores it by its name, under which the copy
    has another one.

    Attributes:
        plan: the plan that the model decodes by.
        kind: the model's class before.
        own: by name, methods that the model itself had, not its class: a hook's `forward`, say.
        config: the object that the model had, and may have shared with other models.
        generation_config: likewise; `None` if the model still has it.
        attn_implementation: the attention that `remove` gives back.
    """

    plan: TidalPlan
    kind: type[PreTrainedModel]
    own: dict[str, Callable[..., Any]]
    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    attn_implementation: str


def plain_method(model: PreTrainedModel, name: str) -> Callable[..., Any]:
    """A method of a model with a plan, as it was before `apply`."""
    applied: Applied = model._tidaldecode
    own = applied.own.get(name)
    if own is None or own == getattr(type(model), name).__get__(model):  # what pickle makes of a bound method
        return partial(getattr(applied.kind, name), model)  # which `torch.compile` can look into, as no `MethodType`
    return own


def plain_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward pass as it was before `apply`, and before the user compiled it: no compiler follows the cache."""
    forward = plain_method(model, "forward")
    return getattr(forward, "_torchdynamo_orig_callable", forward)
