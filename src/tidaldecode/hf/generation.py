"""`model.generate` of a model with a plan: makes the cache, and refuses what would decode wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from tidaldecode.errors import InputError
from tidaldecode.hf.cache import TidalCache
from tidaldecode.plan import TidalPlan

_DEFAULT_NEW_TOKENS = 20  # what Transformers generates when nobody says how much


def tidal_generate(model: PreTrainedModel, plan: TidalPlan) -> Callable[..., Any]:
    """`model.generate` that decodes through a `TidalCache`; arguments and results as before."""
    generate = model.generate

    @functools.wraps(generate)
    def wrapper(
        inputs: Any = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        def setting(name: str) -> Any:
            sources = (kwargs.get(name), getattr(generation_config, name, None), getattr(model.generation_config, name))
            return next((value for value in sources if value is not None), None)

        _refuse_modes(setting, kwargs)
        tokens = _prompt_tokens(inputs, kwargs)
        new_tokens = setting("max_new_tokens") or (setting("max_length") or 0) - tokens
        capacity = tokens + (new_tokens if new_tokens > 0 else _DEFAULT_NEW_TOKENS)
        cache = kwargs.get("past_key_values")
        if cache is None:
            kwargs["past_key_values"] = TidalCache(model.config, plan, capacity)
        else:
            _check_cache(cache, capacity)
        return generate(inputs, generation_config, *args, **kwargs)

    return wrapper


def _refuse_modes(setting: Callable[[str], Any], kwargs: dict[str, Any]) -> None:
    if (setting("num_beams") or 1) > 1:
        raise InputError("tidaldecode can't decode with beam search: use greedy decoding or sampling (num_beams=1)")
    if kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens"):
        raise InputError("tidaldecode can't decode with an assistant model or prompt look-up: leave them out")
    if setting("use_cache") is False:
        raise InputError("tidaldecode decodes from the KV cache: leave out use_cache=False")
    if setting("prefill_chunk_size") is not None:
        raise InputError("tidaldecode reads long prompts in chunks already: leave out prefill_chunk_size")
    if kwargs.get("cache_implementation") is not None:
        raise InputError("tidaldecode has a cache of its own: leave out cache_implementation")


def _check_cache(cache: Cache, capacity: int) -> None:
    if not isinstance(cache, TidalCache):
        raise InputError(f"past_key_values must be a tidaldecode.TidalCache or left out, not a {type(cache).__name__}")
    if cache.capacity < capacity - 1:  # the last token that comes out is never written
        raise InputError(f"the TidalCache holds {cache.capacity} tokens; prompt and new tokens are {capacity}")


def _prompt_tokens(inputs: Any, kwargs: dict[str, Any]) -> int:
    for prompt in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if prompt is not None:
            return int(prompt.shape[1])
    return 1  # Transformers starts with the beginning-of-sequence token
