"""A model's files: its configuration, tokenizer and weights by Transformers, and what tells it from other models."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.errors import InputError, one_line
from tidaldecode.models import demo
from tidaldecode.models.cache import origin_of

if TYPE_CHECKING:  # PyTorch and Transformers take seconds to import, and a wrong name is told without them
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

_BLOCK, _BLOCKS = 1 << 16, 16  # bytes of a block, and blocks of a file, that a model is told by


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are, and what Transformers must be told to read them.

    Only safetensors and GGUF weights are read, and no code that comes with a model runs unless the user trusts it.

    Attributes:
        name: what the user calls the model.
        location: a folder in Transformers' format, or a hub id.
        gguf: the file that the folder was made from, if it was one.
        trust_remote_code: let Transformers run code that comes with the model.
    """

    name: str
    location: str
    gguf: Path | None = None
    trust_remote_code: bool = False

    def config(self) -> PreTrainedConfig:
        """The model's configuration, without its weights."""
        from transformers import AutoConfig

        return self._named(self._read(AutoConfig))

    @property
    def title(self) -> str:
        """What results call the model: of this machine's folders the last alone."""
        return Path(os.path.abspath(self.name)).name if Path(self.name).exists() else self.name

    def digest(self, config: PreTrainedConfig) -> str | None:
        """Tells the files from those of another model of the same name: a hub id's by their commit.

        Of a weight file its size and blocks evenly spaced from its start to its end count: reading all would take as
        long as loading it.

        Raises:
            InputError: a file can't be read.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            return config._commit_hash
        digest = hashlib.sha256()
        try:
            if self.gguf is None:
                digest.update((folder / "config.json").read_bytes())
            for path in [self.gguf] if self.gguf is not None else sorted(folder.glob("*.safetensors")):
                _add_samples(digest, path)
        except OSError as error:
            raise InputError(f"model {self.name!r} can't be read: {one_line(error)}") from error
        return digest.hexdigest()[:16]

    def _named(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A plan is found by a model's name: a GGUF file's, and the one in it; not its folder's in the cache."""
        if self.gguf is not None:
            inside = (origin_of(Path(self.location)) or {}).get("name")
            config.name_or_path = f"{inside} ({self.gguf.name})" if inside else self.gguf.stem
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
            return kind.from_pretrained(location or self.location, trust_remote_code=self.trust_remote_code, **options)
        except Exception as error:  # whatever a damaged file makes the libraries raise
            kept = location is None and (self.name == demo.NAME or self.gguf is not None)
            mend = f"; delete {self.location} and start again" if kept else ""
            raise InputError(f"model {self.name!r} can't be read: {one_line(error)}{mend}") from error


def _add_samples(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8))
        for block in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
