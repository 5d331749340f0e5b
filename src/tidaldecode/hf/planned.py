"""The class of a model with a plan: its own class, with the methods that go by the plan.

A class and not methods set on the model, so that whatever copies a model (deepcopy, pickle, workers that are spawned)
makes one that decodes by the plan, too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from tidaldecode.hf.attention_function import set_attention
from tidaldecode.hf.forward import tidal_forward
from tidaldecode.hf.generation import tidal_generate, tidal_prepare_inputs

REPLACED: dict[str, Callable[..., Any]] = {
    "forward": tidal_forward,
    "generate": tidal_generate,
    "prepare_inputs_for_generation": tidal_prepare_inputs,
    "set_attn_implementation": set_attention,
}
"""The methods of a model that a plan changes, by name."""


_planned: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def planned_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models of a kind that have a plan.

    It has the kind's name and module, for Transformers goes by them: pipelines, `save_pretrained`, attention.
    """
    if kind not in _planned:
        _planned.setdefault(kind, _class_with_plan(kind))
    return _planned[kind]


def _class_with_plan(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    methods = {name: _method(getattr(kind, name), function) for name, function in REPLACED.items()}
    return type(kind.__name__, (kind,), {**names, **methods, "__reduce_ex__": _reduce, "_plain_class": kind})


def plain_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class that a model has without a plan."""
    kind: type[PreTrainedModel] = vars(type(model)).get("_plain_class", type(model))
    return kind


def _method(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the name of the one that it replaces, with its arguments and the function's keywords."""

    @functools.wraps(original)
    def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if "_tidaldecode" not in vars(self):  # made by `type(model)(config)`, or a hook kept it beyond `remove`
            return original(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    added = [value for value in inspect.signature(function).parameters.values() if value.kind is value.KEYWORD_ONLY]
    if added:
        signature = inspect.signature(original)
        before = [value for value in signature.parameters.values() if value.kind is not value.VAR_KEYWORD]
        rest = list(signature.parameters.values())[len(before) :]
        vars(method)["__signature__"] = signature.replace(parameters=[*before, *added, *rest])
        method.__doc__ = f"{inspect.getdoc(function)}\n\n{inspect.getdoc(original)}"
    return method


def _reduce(self: PreTrainedModel, protocol: Any) -> tuple[Any, ...]:
    """Says how a copy is made: no pickle could find this class by its name."""
    return _blank, (plain_class(self),), self.__getstate__()


def _blank(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of a class with a plan that has no state yet."""
    return object.__new__(planned_class(kind))
