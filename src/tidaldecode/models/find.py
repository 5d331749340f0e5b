"""From a model's name to the model: the demo model, a local folder, a GGUF file, or a hub id."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.errors import InputError, one_line
from tidaldecode.models import demo as demo_model

if TYPE_CHECKING:  # PyTorch and Transformers take seconds to import, and a wrong name is told without them
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

_BFLOAT16 = (8, 0)  # compute capability from which on GPUs have it
_BLOCK, _BLOCKS = 1 << 16, 16  # bytes of a block, and blocks of a file, that a model is told by


def _to_stderr(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are, and what Transformers must be told to read them.

    Only safetensors and GGUF weights are read, and no code that comes with a model runs unless the user trusts it.

    Attributes:
        name: what the user calls the model.
        location: a folder in Transformers' format, or a hub id.
        options: for `from_pretrained`.
        gguf: the file that the folder was made from, if it was one.
        gguf_name: the model's name in that file.
    """

    name: str
    location: str
    options: dict[str, Any]
    gguf: Path | None = None
    gguf_name: str | None = None

    def config(self) -> PreTrainedConfig:
        """The model's configuration, without its weights."""
        from transformers import AutoConfig

        return self._named(self._read(AutoConfig))

    @property
    def title(self) -> str:
        """What results call the model: of this machine's folders the last alone."""
        return Path(os.path.abspath(self.name)).name if Path(self.name).exists() else self.name

    def identity(self, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        """What the results of a model have in common, whatever was measured; nothing is loaded.

        Args:
            config: see `config`.

        Raises:
            InputError: a file can't be read.
        """
        from tidaldecode.models.architecture import model_shape

        return {
            "model": self.title,
            "model_shape": model_shape(config).describe(),
            "model_digest": self._digest(config),
            "device_type": device.type,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def _digest(self, config: PreTrainedConfig) -> str | None:
        """Tells the files from those of another model of the same name: a hub id's by their commit.

        Of a weight file its size and blocks evenly spaced from its start to its end count: reading all would take as
        long as loading it.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            commit: str | None = config._commit_hash
            return commit
        digest = hashlib.sha256()
        try:
            if self.gguf is not None:
                weights = [self.gguf]
            else:
                digest.update((folder / "config.json").read_bytes())
                weights = sorted(folder.glob("*.safetensors"))
            for path in weights:
                _add_samples(digest, path)
        except OSError as error:
            raise InputError(f"model {self.name!r} can't be read: {one_line(error)}") from error
        return digest.hexdigest()[:16]

    def _named(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A plan is found by a model's name: a GGUF file's, and the one in it; not its folder's in the cache."""
        if self.gguf is not None:
            config.name_or_path = f"{self.gguf_name} ({self.gguf.name})" if self.gguf_name else self.gguf.stem
        return config

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; pads on the left, as generation needs it."""
        from transformers import AutoTokenizer

        if self.gguf is not None and not (Path(self.location) / "tokenizer.json").is_file():
            tokenizer = self._read(AutoTokenizer, self.gguf.parent, gguf_file=self.gguf.name)  # tells why it can't
        else:
            tokenizer = self._read(AutoTokenizer)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights, for inference.

        Raises:
            InputError: the weights are damaged, incomplete, or no safetensors, or memory is short.
        """
        import torch
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
        model, loading = self._read(AutoModelForCausalLM, **options)
        if missing := sorted(loading["missing_keys"]):
            raise InputError(
                f"model {self.name!r} can't be read: its files lack {missing[0]} and {len(missing) - 1} more"
            )
        self._named(model.config)
        try:
            return model.to(device).eval()
        except torch.OutOfMemoryError as error:
            raise InputError(f"model {self.name!r} does not fit on {device}: {one_line(error)}") from error

    def _read(self, kind: Any, location: str | Path | None = None, **options: Any) -> Any:
        try:
            return kind.from_pretrained(location or self.location, **self.options, **options)
        except Exception as error:  # whatever a damaged file makes the libraries raise
            kept = location is None and (self.name == demo_model.NAME or self.gguf is not None)
            mend = f"; delete {self.location} and start again" if kept else ""
            raise InputError(f"model {self.name!r} can't be read: {one_line(error)}{mend}") from error


def _add_samples(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8))
        for block in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))


def find_model(name: str, *, trust_remote_code: bool = False, report: Callable[[str], None] = _to_stderr) -> ModelFiles:
    """The files of a model.

    Args:
        name: `smollm2-135m` (the demo model), a local folder, a GGUF file (see `converted_gguf`), a folder that holds
            one, or a hub id.
        trust_remote_code: let Transformers run code that comes with the model.
        report: told, in words, what takes long.

    Raises:
        InputError: there is no such file, the demo model can't be fetched, or a GGUF file can't be converted.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name == demo_model.NAME:
        return ModelFiles(name, str(demo_model.demo_model_folder(report)), options)
    if (path := gguf_of(name)) is not None:
        from tidaldecode.models.gguf import converted_gguf

        converted = converted_gguf(path, report)
        return ModelFiles(name, str(converted.folder), options, path, converted.name)
    return ModelFiles(name, name, options)


def gguf_of(name: str) -> Path | None:
    """The GGUF file of a model's name, itself or the only one in its folder; `None` of another model.

    Raises:
        InputError: the name can only be that of a file or folder that is not there, or that holds no model.
    """
    path = Path(name)
    if path.is_file() or path.suffix.lower() == ".gguf":
        return _checked_gguf(path)
    if path.is_dir():
        return None if (path / "config.json").is_file() else _only_gguf(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model folder {name} does not exist")
    return None


def _checked_gguf(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"model file {path} does not exist")
    if path.suffix.lower() != ".gguf":
        raise InputError(f"model file {path} is no GGUF file: of safetensors give the folder that they lie in")
    return path


def _only_gguf(folder: Path) -> Path:
    """The GGUF file of a folder that is not in Transformers' format."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    if not files:
        raise InputError(
            f"model folder {folder} holds no config.json and no GGUF file: it is not in Transformers' format"
        )
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise InputError(f"model folder {folder} holds {len(files)} GGUF files ({names}): give one of them as --model")
    return files[0]


def default_device() -> torch.device:
    """The GPU if there is one, the CPU if not."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float16 on one too old for it; float32 on a CPU, where bfloat16 is slow."""
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= _BFLOAT16 else torch.float16


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
