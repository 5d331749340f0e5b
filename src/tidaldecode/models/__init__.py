"""Models: a name -> model and tokenizer, and which architectures are supported. Imports no PyTorch."""

from tidaldecode.models.architecture import (
    TESTED_ARCHITECTURES,
    check_architecture,
    check_plan,
    model_shape,
    rope_varies,
    sliding_windows,
    steady_channels,
)
from tidaldecode.models.chosen import ChosenModel, DeviceOptions, ModelOptions, check_dtype
from tidaldecode.models.files import ModelFiles
from tidaldecode.models.find import find_model, gguf_of

__all__ = [
    "TESTED_ARCHITECTURES",
    "ChosenModel",
    "DeviceOptions",
    "ModelFiles",
    "ModelOptions",
    "check_architecture",
    "check_dtype",
    "check_plan",
    "find_model",
    "gguf_of",
    "model_shape",
    "rope_varies",
    "sliding_windows",
    "steady_channels",
]
