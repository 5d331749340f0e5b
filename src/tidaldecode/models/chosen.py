"""The model that the options of a command choose, and where and in which dtype it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from tidaldecode.errors import InputError
from tidaldecode.models.architecture import model_shape
from tidaldecode.models.files import ModelFiles
from tidaldecode.models.find import find_model
from tidaldecode.options import Option, TrustRemoteCode

if TYPE_CHECKING:  # they take seconds to import, and a wrong name is told without them
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_BFLOAT16 = (8, 0)  # compute capability from which on GPUs have it


@dataclass(frozen=True)
class DeviceOptions:
    """Where something runs, and in which dtype."""

    device: Annotated[str | None, Option("cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Option("Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto"

    def find_device(self) -> torch.device:
        """The device.

        Raises:
            InputError: the name is unknown, or there is no such device.
        """
        import torch

        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise InputError(f"--device {self.device!r} is unknown: give cpu, cuda or cuda:N") from None
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"--device {self.device!r} is not supported: give cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {self.device}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here")
        return device

    def find_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype; `auto` is bfloat16 on a GPU, float16 on one too old for it, and on a CPU float32, its fastest.

        Raises:
            InputError: the GPU does not have it.
        """
        import torch

        if self.dtype != "auto":
            dtype: torch.dtype = getattr(torch, self.dtype)
        elif device.type != "cuda":
            dtype = torch.float32
        else:
            dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= _BFLOAT16 else torch.float16
        check_dtype(device, dtype)
        return dtype


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where, and in which dtype."""

    model: Annotated[str, Option("Demo model, local folder, GGUF file or hub id.", metavar="NAME|PATH")] = (
        "smollm2-135m"
    )
    where: DeviceOptions = DeviceOptions()
    trust_remote_code: TrustRemoteCode = False

    def find(self) -> ChosenModel:
        """The model, not loaded yet; imports PyTorch.

        Raises:
            InputError: there is no such model or device, or the GPU has no such dtype.
        """
        device = self.where.find_device()
        dtype = self.where.find_dtype(device)
        return ChosenModel(find_model(self.model, trust_remote_code=self.trust_remote_code), device, dtype)


@dataclass(frozen=True)
class ChosenModel:
    """A model's files, the device that it is loaded on and the dtype of its weights."""

    files: ModelFiles
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, read once."""
        return self.files.config()

    @property
    def dtype_name(self) -> str:
        """As results call it: `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def identity(self) -> dict[str, str | None]:
        """What the results of the model have in common, whatever was measured; nothing is loaded.

        Raises:
            InputError: a file can't be read.
        """
        return {
            "model": self.files.title,
            "model_shape": model_shape(self.config).describe(),
            "model_digest": self.files.digest(self.config),
            "device_type": self.device.type,
            "dtype": self.dtype_name,
        }

    def load(self) -> PreTrainedModel:
        """The model with its weights, see `ModelFiles.model`."""
        return self.files.model(self.device, self.dtype)


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Refuses bfloat16 on a GPU that does not have it.

    Raises:
        InputError: the compute capability is below 8.0.
    """
    import torch

    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _BFLOAT16:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise InputError(f"{name} has compute capability {major}.{minor}, and bfloat16 needs 8.0: give --dtype float16")
