"""What TidalDecode must know of a Transformers model: the shape of its attention, and whether it can work with it."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from tidaldecode.errors import InputError
from tidaldecode.plan import ModelShape, TidalPlan, published_reselect_layer

if TYPE_CHECKING:  # it takes seconds to import, and who has a configuration has imported it
    from transformers import PreTrainedConfig

TESTED_ARCHITECTURES = (
    "gemma",
    "gemma3_text",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
"""`model_type` of the architectures that the test suite compares with full attention, step by step."""

_log = logging.getLogger(__name__)
_warned: set[str] = set()


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """The attention shape of a supported model."""
    heads = config.num_attention_heads
    return ModelShape(
        name=config.name_or_path or None,
        num_layers=config.num_hidden_layers,
        num_query_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """For each layer the tokens of its sliding window, `None` where it attends to the whole context.

    A window that no context of the model fills is none.
    """
    from transformers import DynamicCache

    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return [None if window is None or window >= config.max_position_embeddings else window for window in windows]


def rope_varies(config: PreTrainedConfig) -> bool:
    """Whether RoPE's frequencies of a whole forward pass go by its largest position."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") in ("longrope", "dynamic")


def steady_channels(config: PreTrainedConfig) -> list[bool]:
    """For each channel of a key whether RoPE turns it by a quarter at most over the longest context of the model.

    The mean of such a channel over the first tokens is still its mean far behind them. Channels are taken to turn in
    pairs half a head dim apart, as in all tested architectures.
    """
    dim = model_shape(config).head_dim
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:
        return [True] * dim
    pairs = int(dim * rope.get("partial_rotary_factor", 1.0)) // 2
    longest = config.max_position_embeddings
    steady = [2 * math.pi * rope["rope_theta"] ** (pair / pairs) >= 4 * longest for pair in range(pairs)]
    return steady + steady + [True] * (dim - 2 * pairs)


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuses a model that TidalDecode can't work with.

    Raises:
        InputError: the model is an encoder-decoder, has linear or latent attention, soft-capped scores or attention
            sinks in its weights, takes images, or has no layer that attends to the whole context.
    """
    obstacle = _obstacle(config)
    if obstacle is not None:
        supported = ", ".join(TESTED_ARCHITECTURES)
        raise InputError(f"tidaldecode can't work with {config.model_type!r}: {obstacle}; it works with {supported}")
    if config.model_type not in TESTED_ARCHITECTURES:
        _warn_once(f"tidaldecode has not been tested with {config.model_type!r}; compare with full attention first")


def _obstacle(config: PreTrainedConfig) -> str | None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if config.get_text_config(decoder=True) is not config:
        return "it takes more than text (load its text model alone)"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "it has multi-head latent attention (MLA)"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it soft-caps its attention scores"
    if config.model_type == "gpt_oss":
        return "it has attention sinks in its weights"
    if not hasattr(config, "num_attention_heads"):
        return "it has no attention"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING or not hasattr(config, "max_position_embeddings"):
        return "it is no causal language model"
    layers = DynamicCache(config=config).layers
    others = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if others:
        return "it has layers with linear, indexed or shared attention"
    if all(window is not None for window in sliding_windows(config)):
        return f"all its layers attend to a sliding window ({config.sliding_window} tokens)"
    return None


def check_plan(plan: TidalPlan, config: PreTrainedConfig) -> None:
    """Refuses a plan that was made for another model, and warns of one that can't be good for this one.

    Raises:
        InputError: other number of layers, other heads, or a role for a layer with a sliding window.
    """
    shape = model_shape(config)
    if (wrong := plan.mismatch(shape.model_dump(exclude={"name"}))) is not None:
        raise InputError(wrong)
    for layer, (role, window) in enumerate(zip(plan.roles, sliding_windows(config), strict=True)):
        if window is not None and role is not None:
            raise InputError(f"layer {layer} attends to a sliding window; its role must be null, not {role!r}")
        if window is None and role is None:
            raise InputError(f"layer {layer} attends to the whole context and needs a role, not null")
    if plan.sources is not None or plan.key_bits is not None:  # checks heads where the plan names no model
        TidalPlan.validated(**{**plan.model_dump(), "model": shape.model_dump()})
    if (doubt := _doubt(plan, config)) is not None:
        _warn_once(doubt)


def _doubt(plan: TidalPlan, config: PreTrainedConfig) -> str | None:
    """Why a plan that fits the model may still not be what its user wants."""
    name = f"plan {plan.name or 'without a name'} on {config.name_or_path or 'this model'}"
    if "select" in plan.roles and not plan.reading and plan.drafting == "plan":
        return f"{name}: no layer is sparse, so every layer reads all tokens"
    if plan.name != "paper" or published_reselect_layer(config.name_or_path) is not None:
        return None
    layers = tuple(layer for layer, window in enumerate(sliding_windows(config)) if window is None)
    if plan.roles != TidalPlan.paper(len(plan.roles), global_layers=layers).roles:
        return None  # somebody chose the layer
    layer = max(layer for layer, role in enumerate(plan.roles) if role == "select")
    return (
        f"{name}: its re-selection layer, {layer}, is a default that was not tuned for this model, and may lose much; "
        "`tidaldecode calibrate` finds a plan"
    )


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning("%s", message)
