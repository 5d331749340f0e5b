"""Models of public shapes with random weights: a decode step takes as long whatever the weights say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidaldecode.errors import InputError

if TYPE_CHECKING:  # they take seconds to import, and a wrong name is told without them
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def _fields(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int = 128
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("LlamaConfig", _fields(32000, 4096, 11008, 32, 32, 32)),
    "llama-2-13b": ("LlamaConfig", _fields(32000, 5120, 13824, 40, 40, 40)),
    "llama-3-8b": ("LlamaConfig", _fields(128256, 4096, 14336, 32, 32, 8)),
    "llama-3.1-8b": ("LlamaConfig", _fields(128256, 4096, 14336, 32, 32, 8)),
    "llama-3.2-1b": ("LlamaConfig", {**_fields(128256, 2048, 8192, 16, 32, 8, 64), "tie_word_embeddings": True}),
    "llama-3.2-3b": ("LlamaConfig", {**_fields(128256, 3072, 8192, 28, 24, 8), "tie_word_embeddings": True}),
    "mistral-7b": ("MistralConfig", {**_fields(32768, 4096, 14336, 32, 32, 8), "sliding_window": None}),
    "qwen2.5-7b": ("Qwen2Config", _fields(152064, 3584, 18944, 28, 28, 4)),
    "qwen3-8b": ("Qwen3Config", _fields(151936, 4096, 12288, 36, 32, 8)),
    "tiny": ("LlamaConfig", _fields(256, 64, 128, 6, 4, 2, 16)),
}

CONFIGS = tuple(_SHAPES)
"""Names of the public shapes; `tiny` is for trying out the benchmark itself."""


@dataclass(frozen=True)
class RandomModel:
    """A model of a public shape; stands where `tidaldecode.models.ModelFiles` does.

    Raises:
        InputError: the name is none of `CONFIGS`.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in _SHAPES:
            raise InputError(f"no config {self.name!r}: give one of {', '.join(CONFIGS)}, or a --model")

    def config(self) -> PreTrainedConfig:
        """The model's configuration; of any number of positions."""
        import transformers

        kind, fields = _SHAPES[self.name]
        config = getattr(transformers, kind)(
            **fields, max_position_embeddings=2**20, bos_token_id=None, eos_token_id=None
        )
        config.name_or_path = self.name
        return config

    def model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model, its weights made on the device."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config(), dtype=dtype).eval()
