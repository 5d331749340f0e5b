"""`model.generate` of a model with a plan: makes the cache, and refuses what would decode wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import Cache

from tidaldecode.errors import InputError
from tidaldecode.hf.applied import plain_method
from tidaldecode.hf.cache import TidalCache
from tidaldecode.hf.second_pass.correction import Correction, check_second_pass
from tidaldecode.hf.second_pass.drafting import DraftLength, Lossless
from tidaldecode.hf.second_pass.lossless import lossless_loop
from tidaldecode.hf.sequences import Sequences

_VIRTUAL_KEYS = ("PREFIX_TUNING", "CARTRIDGE")  # PEFT's adapters whose virtual tokens are K and V
_DEFAULT_NEW_TOKENS = 20  # what Transformers generates when nobody says how much


def tidal_generate(
    model: PreTrainedModel,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    *args: Any,
    lossless: Lossless | None = None,
    correction_interval: int | None = None,
    **kwargs: Any,
) -> Any:
    """The model's `generate`, decoding through a `TidalCache`; arguments and results as before, and two more.

    Args:
        lossless: tokens to draft by the plan in a round, or `auto`; the new tokens are full attention's. Also sampled
            ones, in distribution.
        correction_interval: decoded tokens after which those tokens run again with full attention.

    Raises:
        InputError: a mode or option that the cache can't follow, or a number that is not positive.
    """
    generate = plain_method(model, "generate")
    kwargs |= _named(generate, inputs, generation_config, *args)

    def setting(name: str) -> Any:
        sources = (
            kwargs.get(name),
            getattr(kwargs.get("generation_config"), name, None),
            getattr(model.generation_config, name, None),
        )
        return next((value for value in sources if value is not None), None)

    _refuse_modes(setting, kwargs)
    _refuse_virtual_tokens(model, lossless)
    cache = kwargs.get("past_key_values")
    _check_kind(cache)
    tokens = _prompt_tokens(kwargs.get("inputs"), kwargs)
    past = _check_history(cache, tokens, setting, kwargs)
    new_tokens = setting("max_new_tokens") or (setting("max_length") or 0) - tokens
    new_tokens = new_tokens if new_tokens > 0 else _DEFAULT_NEW_TOKENS
    length = None if lossless is None else DraftLength(lossless, most=new_tokens)
    correction = None if correction_interval is None else Correction(correction_interval)
    if length is not None and correction is not None:
        raise InputError("lossless decoding corrects the cache in each round: leave out correction_interval")
    for name, asked in (("lossless", length), ("correction_interval", correction)):
        if asked is not None:
            check_second_pass(model.config, name)
    if length is not None:
        _refuse_beside_lossless(setting, kwargs, cache)
    capacity = past + new_tokens
    if length is not None and (cache is None or _sequences(setting, kwargs) > 1):
        # one sequence may be done while another one still drafts; and a last, shorter round can be verified by the
        # captured pass of the others
        capacity += length.longest
    cache_is_kept = cache is not None or bool(setting("return_dict_in_generate"))
    if cache is None:
        cache = kwargs["past_key_values"] = TidalCache(model.config, model._tidaldecode.plan, capacity)
    else:
        cache.make_room(capacity - 1 - cache.get_seq_length())  # the last token that comes out is never written
    if length is not None:
        _keep_stop_strings(kwargs, model.generation_config.stop_strings)
        kwargs["custom_generate"] = lossless_loop(length, kwargs.get("streamer"), cache_is_kept)
    elif kwargs.get("custom_generate") is not None:  # which may make masks of its own
        return _corrected(model, cache, correction, kwargs)
    with cache.one_mask():
        return _corrected(model, cache, correction, kwargs)


def _named(generate: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Arguments of `generate` that were given by place, by their names; those that are `None` left out."""
    bound = inspect.signature(generate).bind_partial(*args).arguments
    return {name: value for name, value in bound.items() if value is not None}


def _corrected(model: PreTrainedModel, cache: TidalCache, correction: Correction | None, kwargs: dict[str, Any]) -> Any:
    """Generates with this correction, and with the cache's own if there is none."""
    if correction is None:
        return plain_method(model, "generate")(**kwargs)
    before = cache.correction
    if before is not None:
        before.correct(model, cache)  # what it still had to run again is not the cache's end any more afterwards
    cache.correction = correction
    try:
        return plain_method(model, "generate")(**kwargs)
    finally:
        cache.correction = before


def _refuse_beside_lossless(setting: Callable[[str], Any], kwargs: dict[str, Any], cache: TidalCache | None) -> None:
    if cache is not None and cache.correction is not None:
        raise InputError("lossless decoding corrects the cache in each round: set cache.correction to None")
    if kwargs.get("custom_generate") is not None:
        raise InputError("lossless decoding is a loop of its own: leave out custom_generate, or lossless")
    if kwargs.get("synced_gpus"):
        raise InputError("lossless decoding runs on one GPU: leave out synced_gpus, or lossless")
    for name in ("output_scores", "output_logits", "output_hidden_states"):
        if setting(name):
            raise InputError(f"lossless decoding keeps tokens alone: leave out {name}, or lossless")


def _keep_stop_strings(kwargs: dict[str, Any], own: str | list[str] | None) -> None:
    """Makes the criterion of stop strings here: Transformers hands no tokenizer on beside `custom_generate`.

    It would want one for those of the model's own configuration, too, if the call did not say that there are none.
    """
    strings = kwargs.get("stop_strings") or getattr(kwargs.get("generation_config"), "stop_strings", None) or own
    if strings is None:
        return
    if kwargs.get("tokenizer") is None:
        raise InputError("stop_strings need the tokenizer: pass tokenizer=... to generate")
    kwargs["stop_strings"] = None
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=kwargs["tokenizer"])
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])


def tidal_prepare_inputs(model: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The model's `prepare_inputs_for_generation`, but the cache stays in use.

    Phi-3 drops its cache where a prompt crosses the length up to which it was first trained, and reads the whole
    sequence again with other RoPE frequencies; here the same cache is emptied and filled again.
    """
    prepare = plain_method(model, "prepare_inputs_for_generation")
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


def _refuse_virtual_tokens(model: PreTrainedModel, lossless: Lossless | None) -> None:
    """PEFT's prompts that are learned: those that come as K and V come in a cache of PEFT's own, instead of ours.

    Those that come as embeddings in front of the prompt are read as part of it. The loop of lossless decoding goes by
    the tokens that it sees, and they are none.
    """
    owner = getattr(model.prepare_inputs_for_generation, "__self__", None)  # PEFT puts its own method there
    adapter = getattr(owner, "active_peft_config", None)
    if adapter is None or not getattr(adapter, "is_prompt_learning", False):
        return
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    if kind in _VIRTUAL_KEYS:
        raise InputError(
            f"tidaldecode can't decode with {kind} adapters, which bring a cache of their own: remove the plan"
        )
    if lossless is not None:
        raise InputError(
            f"lossless decoding can't go with {kind} adapters, which put virtual tokens in front: leave it out"
        )


def _check_kind(cache: Cache | None) -> None:
    if cache is not None and not isinstance(cache, TidalCache):
        raise InputError(f"past_key_values must be a tidaldecode.TidalCache or left out, not a {type(cache).__name__}")


def _check_history(cache: TidalCache | None, tokens: int, setting: Callable[[str], Any], kwargs: dict[str, Any]) -> int:
    """Refuses a prompt that can't be what the cache goes on with.

    As in Transformers the prompt is the whole conversation, of which the cache holds the beginning; or it is what is
    new, and `attention_mask` is longer, as long as both.

    Args:
        tokens: of the prompt, padding counted.

    Returns:
        Tokens of the whole conversation.

    Raises:
        InputError: nothing is new, or the mask is not of this conversation.
    """
    past = 0 if cache is None else cache.get_seq_length()
    mask = kwargs.get("attention_mask")
    whole = mask is None or mask.shape[-1] == tokens or kwargs.get("inputs_embeds") is not None
    new = tokens - past if whole else tokens
    if new < 1:
        raise InputError(
            f"the cache holds {past} tokens, the prompt has {tokens}: give the whole conversation, with something new "
            "at its end, or crop() the cache"
            if past
            else "the prompt has no tokens: give at least one"
        )
    if mask is not None:
        copies = int(setting("num_return_sequences") or 1)
        batch = _sequences(setting, kwargs)
        sequences = Sequences() if cache is None else cache.sequences
        sequences.check(batch, new)
        sequences.check_mask(mask.repeat_interleave(copies, 0), batch, new)
    return past + new


def _sequences(setting: Callable[[str], Any], kwargs: dict[str, Any]) -> int:
    """Sequences that are decoded side by side."""
    prompts = (kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    batch = max((len(prompt) for prompt in prompts if prompt is not None), default=1)
    return batch * int(setting("num_return_sequences") or 1)


def _prompt_tokens(inputs: Any, kwargs: dict[str, Any]) -> int:
    prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    # without a prompt Transformers starts with the beginning-of-sequence token
    return max((int(prompt.shape[1]) for prompt in prompts if prompt is not None), default=1)
