"""`model.generate` of a model with a plan: makes the cache, and refuses what would decode wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from tidaldecode.errors import InputError
from tidaldecode.hf.cache import TidalCache

_DEFAULT_NEW_TOKENS = 20  # what Transformers generates when nobody says how much


def tidal_generate(
    model: PreTrainedModel,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's `generate`, decoding through a `TidalCache`; arguments and results as before."""

    def setting(name: str) -> Any:
        sources = (
            kwargs.get(name),
            getattr(generation_config, name, None),
            getattr(model.generation_config, name, None),
        )
        return next((value for value in sources if value is not None), None)

    _refuse_modes(setting, kwargs)
    tokens = _prompt_tokens(inputs, kwargs)
    new_tokens = setting("max_new_tokens") or (setting("max_length") or 0) - tokens
    capacity = tokens + (new_tokens if new_tokens > 0 else _DEFAULT_NEW_TOKENS)
    cache = kwargs.get("past_key_values")
    if cache is None:
        kwargs["past_key_values"] = TidalCache(model.config, model._tidaldecode.plan, capacity)
    else:
        _check_cache(cache, capacity)
    return model._tidaldecode.generate(inputs, generation_config, *args, **kwargs)


def tidal_prepare_inputs(model: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The model's `prepare_inputs_for_generation`, but the cache stays in use.

    Phi-3 drops its cache where a prompt crosses the length up to which it was first trained, and reads the whole
    sequence again with other RoPE frequencies; here the same cache is emptied and filled again.
    """
    prepare = model._tidaldecode.prepare_inputs
    inputs: dict[str, Any] = prepare(*args, **kwargs)
    cache = kwargs.get("past_key_values")
    if isinstance(cache, TidalCache) and inputs.get("past_key_values") is None:
        inputs = prepare(*args, **kwargs | {"past_key_values": None, "next_sequence_length": None})
        cache.reset()
        inputs["past_key_values"] = cache
    return inputs


def _refuse_modes(setting: Callable[[str], Any], kwargs: dict[str, Any]) -> None:
    if (setting("num_beams") or 1) > 1:
        raise InputError("tidaldecode can't decode with beam search: use greedy decoding or sampling (num_beams=1)")
    assistants = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    if kwargs.get("assistant_model") is not None or any(setting(name) for name in assistants):
        raise InputError(
            "tidaldecode can't decode with an assistant model, early exit or prompt look-up: leave them out"
        )
    if setting("use_cache") is False:
        raise InputError("tidaldecode decodes from the KV cache: leave out use_cache=False")
    if setting("prefill_chunk_size") is not None:
        raise InputError("tidaldecode reads long prompts in chunks already: leave out prefill_chunk_size")
    if setting("cache_implementation") is not None:
        raise InputError("tidaldecode has a cache of its own: leave out cache_implementation")
    if setting("output_attentions"):
        raise InputError("tidaldecode does not keep attention weights: leave out output_attentions")


def _check_cache(cache: Cache, capacity: int) -> None:
    if not isinstance(cache, TidalCache):
        raise InputError(f"past_key_values must be a tidaldecode.TidalCache or left out, not a {type(cache).__name__}")
    if cache.capacity < capacity - 1:  # the last token that comes out is never written
        raise InputError(
            f"the TidalCache holds {cache.capacity} tokens; prompt and new tokens are {capacity}: start with "
            f"past_key_values=tidaldecode.TidalCache(model.config, plan, capacity={capacity}) or more"
        )


def _prompt_tokens(inputs: Any, kwargs: dict[str, Any]) -> int:
    prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    # without a prompt Transformers starts with the beginning-of-sequence token
    return max((int(prompt.shape[1]) for prompt in prompts if prompt is not None), default=1)
