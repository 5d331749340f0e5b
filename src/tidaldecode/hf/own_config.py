"""A configuration of a model's own: its attention is named there, and models may share one configuration."""

from __future__ import annotations

import copy
from typing import TypeVar

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

Config = TypeVar("Config", PreTrainedConfig, GenerationConfig)


def take_own_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Puts a copy of a model's configuration in its place, in all parts of the model.

    Returns:
        The configuration that the model had.
    """
    shared = model.config
    _replace(model, shared, copy.copy(shared))
    return shared


def give_back_config(model: PreTrainedModel, shared: PreTrainedConfig) -> None:
    """Undoes `take_own_config`, unless the model's own configuration says something else by now."""
    _replace(model, model.config, unless_changed(model.config, shared))


def unless_changed(own: Config, shared: Config) -> Config:
    """The configuration that a copy was made of, or the copy if something else was set in one of them since."""
    return shared if vars(own) == vars(shared) else own  # `==` looks at some of it alone


def _replace(model: PreTrainedModel, before: PreTrainedConfig, after: PreTrainedConfig) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if value is before:
                vars(module)[name] = after
