"""The attention function that Transformers' models call, by its public attention interface, and a pass that does."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor, nn, no_grad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tidaldecode.errors import InputError
from tidaldecode.hf.applied import plain_forward, plain_method
from tidaldecode.hf.cache import TidalCache
from tidaldecode.hf.cache_name import CACHE
from tidaldecode.hf.captured import StepCache, decode_attention
from tidaldecode.hf.layers import TidalLayer

NAME = "tidaldecode"
"""Name under which the attention function is registered with Transformers."""

_log = logging.getLogger(__name__)


def own_pass(model: PreTrainedModel, cache: TidalCache, /, **arguments: Any) -> Any:
    """The model's own forward pass through a cache, after `cache.begin`; its output.

    Raises:
        InputError: the model does not pass on what its layers need to attend through the cache.
    """
    with no_grad():  # the cache would hold on to every activation that its K and V came from
        output = plain_forward(model)(**arguments | {CACHE: cache, "tidal_cache": cache})
    if not cache.session.attended_everywhere():
        raise InputError(f"{type(model).__name__} does not pass on what tidaldecode needs: it can't work with it")
    return output


def tidal_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tidal_cache: TidalCache | StepCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, by its role if it has one, by SDPA if not.

    Args:
        module: the attention module; `layer_idx` is its layer.
        query: [B, Hq, N, D].
        key, value: [B, Hkv, T, D]; what the cache returned.
        attention_mask: for SDPA; a layer with a role goes by the lengths in `tidal_cache`, and gets none.
        tidal_cache: the cache in use; without one (training, `use_cache=False`) attention is full.

    Returns:
        [B, N, Hq, D], and no weights.

    Raises:
        InputError: the model asks for attention that tidaldecode does not have.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(tidal_cache, TidalCache) and not isinstance(tidal_cache.layers[layer], TidalLayer):
        tidal_cache = None  # the layer keeps a sliding window
    if tidal_cache is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None:  # `tidal_mask` made none, so the model itself did
        raise InputError(
            f"tidaldecode can't work with {_model_type(module)!r}: layer {layer} attends by a mask of the model's own"
        )
    for feature in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise InputError(f"layer {layer} asks for attention with {feature!r}, which tidaldecode does not have")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(tidal_cache, StepCache):
        return decode_attention(query, key, value, layer, float(scale)), None
    cached = tidal_cache.layers[layer]
    if key is not cached.keys or value is not cached.values:
        raise InputError("the model changes K or V on their way from the cache: it can't work with tidaldecode")
    return tidal_cache.session.attend(layer, query.transpose(1, 2), scale), None


def tidal_mask(*, kv_length: int, **kwargs: Any) -> Tensor | None:
    """The mask of SDPA's layers; none for a layer of `TidalCache`, which asks for a mask over zero keys."""
    if kv_length == 0:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](kv_length=kv_length, **kwargs)


def _model_type(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "model_type", type(module).__name__)


def set_attention(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """`set_attn_implementation` of a model with a plan, which keeps it: what was asked for comes with `remove`."""
    set_attn_implementation = plain_method(model, "set_attn_implementation")
    set_attn_implementation(*args, **kwargs)
    asked = model.config._attn_implementation
    if asked == NAME:
        return
    set_attn_implementation({"": NAME})
    model._tidaldecode = replace(model._tidaldecode, attn_implementation=asked)
    _log.warning("the model keeps its plan: its attention will be %r after tidaldecode.remove(model)", asked)


AttentionInterface.register(NAME, tidal_attention_forward)
AttentionMaskInterface.register(NAME, tidal_mask)
