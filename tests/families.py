"""Configurations of tiny models, one for each supported family, with layers enough for every role."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from tidaldecode import ModelShape, TidalPlan
from tidaldecode.plan import Selection

LAYERS = 7


def _common(heads: int, kv_heads: int, head_dim: int) -> dict[str, object]:
    return {
        "vocab_size": 260,
        "hidden_size": heads * head_dim,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # wide, so that attention is peaked and a wrong token shows
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }


def _config(kind: type[PreTrainedConfig], heads: int, kv_heads: int, head_dim: int, **more: object):
    return lambda **overrides: kind(**{**_common(heads, kv_heads, head_dim), **more, **overrides})


_GEMMA_LAYERS = ["sliding_attention", *["full_attention"] * 2] * 2 + ["sliding_attention", *["full_attention"] * 3]

FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": _config(LlamaConfig, 6, 2, 16),
    "mistral": _config(MistralConfig, 4, 1, 16, sliding_window=None),
    "qwen2": _config(Qwen2Config, 14, 2, 8),
    "qwen3": _config(Qwen3Config, 4, 4, 24),
    "phi3": _config(Phi3Config, 4, 2, 16),
    "gemma3_text": _config(
        Gemma3TextConfig, 4, 2, 16, num_hidden_layers=10, layer_types=_GEMMA_LAYERS, sliding_window=12,
        query_pre_attn_scalar=16,
    ),
    "mixtral": _config(MixtralConfig, 8, 1, 8, sliding_window=None, num_local_experts=3, num_experts_per_tok=2),
    "gpt_neox": _config(GPTNeoXConfig, 3, 3, 16, rotary_pct=0.5),
    "gemma": _config(GemmaConfig, 4, 1, 16),
    "granite": _config(GraniteConfig, 4, 2, 16, attention_multiplier=0.1),
    "olmo2": _config(Olmo2Config, 4, 2, 16),
    "qwen3_moe": _config(Qwen3MoeConfig, 4, 2, 16, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32),
    "smollm3": _config(SmolLM3Config, 4, 1, 16),
}  # fmt: skip


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Heads and layers of a tiny model, read here and not by the code under test."""
    heads = config.num_attention_heads
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_query_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", heads),
        head_dim=config.hidden_size // heads,
    )


def plan_for(
    config: PreTrainedConfig,
    selection: Selection = "unified",
    token_budget: int | float = 16,
    sink_tokens: int = 0,
    recent_tokens: int | float = 1,
) -> TidalPlan:
    """Full, select, sparse, sparse, select, sparse, ... on the layers that attend to the whole context."""
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    pattern = iter(["full", "select", "sparse", "sparse", "select", "sparse", "sparse"])
    return TidalPlan(
        roles=tuple(next(pattern) if kind == "full_attention" else None for kind in layer_types),
        selection=selection,
        token_budget=token_budget,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    )


def ragged_batch(lengths: tuple[int, ...] = (40, 23, 31), seed: int = 0):
    """Random prompts of these lengths, left-padded: ids and mask, [B, max(lengths)]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, 260, (len(lengths), width), generator=generator)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids * mask + (1 - mask), mask
