"""`model.generate` of a model with a plan: makes the cache, and refuses what would decode wrong."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from tidaldecode.errors import InputError
from tidaldecode.hf.applied import plain_method
from tidaldecode.hf.cache import TidalCache
from tidaldecode.hf.cache_name import CACHE, with_cache_named
from tidaldecode.hf.second_pass import Correction, DraftLength, Lossless, check_second_pass, correct, lossless_loop
from tidaldecode.hf.sequences import Sequences

_VIRTUAL_KEYS = ("PREFIX_TUNING", "CARTRIDGE")  # PEFT's adapters whose virtual tokens are K and V
_DEFAULT_NEW_TOKENS = 20  # what Transformers generates when nobody says how much

_ASSISTED = "tidaldecode can't decode with an assistant model, early exit or prompt look-up: leave them out"
_UNSUPPORTED = {
    "assistant_model": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "use_mtp": _ASSISTED,
    "prefill_chunk_size": "tidaldecode reads long prompts in chunks already: leave out prefill_chunk_size",
    "cache_implementation": "tidaldecode has a cache of its own: leave out cache_implementation",
    "output_attentions": "tidaldecode does not keep attention weights: leave out output_attentions",
}
_UNSUPPORTED_BY_LOSSLESS = {
    "custom_generate": "lossless decoding is a loop of its own: leave out custom_generate, or lossless",
    "synced_gpus": "lossless decoding runs on one GPU: leave out synced_gpus, or lossless",
    **{
        name: f"lossless decoding keeps tokens alone: leave out {name}, or lossless"
        for name in ("output_scores", "output_logits", "output_hidden_states")
    },
}
"""Options that are refused, and what is said then."""


class _Call:
    """The arguments of one call of `generate` by their names, and what they leave to the configurations."""

    def __init__(self, model: PreTrainedModel, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._sources = arguments.get("generation_config"), model.generation_config
        prompts = [arguments.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
        shapes = [prompt.shape for prompt in prompts if prompt is not None]
        # without a prompt Transformers starts with the beginning-of-sequence token
        self.tokens = max((int(shape[1]) for shape in shapes), default=1)
        self.copies = int(self.setting("num_return_sequences") or 1)
        self.sequences = max((int(shape[0]) for shape in shapes), default=1) * self.copies  # decoded side by side

    def setting(self, name: str) -> Any:
        """What an argument, or else a configuration, says; `None` where nobody does."""
        values = (self.arguments.get(name), *(getattr(source, name, None) for source in self._sources))
        return next((value for value in values if value is not None), None)

    def refuse(self, options: dict[str, str]) -> None:
        for name, message in options.items():
            if self.setting(name) not in (None, False):
                raise InputError(message)


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
    by_place = inspect.signature(plain_method(model, "generate")).bind_partial(inputs, generation_config, *args)
    kwargs |= {name: value for name, value in by_place.arguments.items() if value is not None}
    kwargs = with_cache_named(kwargs)
    call = _Call(model, kwargs)
    _refuse_modes(model, call, lossless)
    cache = kwargs.get(CACHE)
    tokens = _history(cache, call)
    new_tokens = call.setting("max_new_tokens") or (call.setting("max_length") or 0) - call.tokens
    new_tokens = new_tokens if new_tokens > 0 else _DEFAULT_NEW_TOKENS
    length = None if lossless is None else DraftLength(lossless, most=new_tokens)
    correction = None if correction_interval is None else Correction(correction_interval)
    _check_second_pass(model, call, length, correction)
    capacity = tokens + new_tokens
    if length is not None and (cache is None or call.sequences > 1):
        # one sequence may be done while another one still drafts; and a last, shorter round can be verified by the
        # captured pass of the others
        capacity += length.longest
    cache_is_kept = cache is not None or bool(call.setting("return_dict_in_generate"))
    if cache is None:
        cache = kwargs[CACHE] = TidalCache(model.config, model._tidaldecode.plan, capacity)
    else:
        cache.make_room(capacity - 1 - cache.get_seq_length())  # the last token that comes out is never written
    if length is not None:
        _keep_stop_strings(call)
        kwargs["custom_generate"] = lossless_loop(length, kwargs.get("streamer"), cache_is_kept)
    elif kwargs.get("custom_generate") is not None:  # which may make masks of its own
        return _corrected(model, cache, correction, kwargs)
    with cache.one_mask():
        return _corrected(model, cache, correction, kwargs)


def _corrected(model: PreTrainedModel, cache: TidalCache, correction: Correction | None, kwargs: dict[str, Any]) -> Any:
    """Generates with this correction, and with the cache's own if there is none."""
    if correction is None:
        return plain_method(model, "generate")(**kwargs)
    before = cache.correction
    correct(model, cache)  # what it still had to run again is not the cache's end any more afterwards
    cache.correction = correction
    try:
        return plain_method(model, "generate")(**kwargs)
    finally:
        cache.correction = before


def _refuse_modes(model: PreTrainedModel, call: _Call, lossless: Lossless | None) -> None:
    if (call.setting("num_beams") or 1) > 1:
        raise InputError("tidaldecode can't decode with beam search: use greedy decoding or sampling (num_beams=1)")
    if call.setting("use_cache") is False:
        raise InputError("tidaldecode decodes from the KV cache: leave out use_cache=False")
    call.refuse(_UNSUPPORTED)
    _refuse_virtual_tokens(model, lossless)
    cache = call.arguments.get(CACHE)
    if cache is not None and not isinstance(cache, TidalCache):
        raise InputError(f"{CACHE} must be a tidaldecode.TidalCache or left out, not a {type(cache).__name__}")


def _check_second_pass(
    model: PreTrainedModel, call: _Call, length: DraftLength | None, correction: Correction | None
) -> None:
    if length is not None and correction is not None:
        raise InputError("lossless decoding corrects the cache in each round: leave out correction_interval")
    if correction is not None:
        check_second_pass(model.config, "correction_interval")
    if length is not None:
        check_second_pass(model.config, "lossless")
        cache = call.arguments.get(CACHE)
        if cache is not None and cache.correction is not None:
            raise InputError("lossless decoding corrects the cache in each round: set cache.correction to None")
        call.refuse(_UNSUPPORTED_BY_LOSSLESS)


def _history(cache: TidalCache | None, call: _Call) -> int:
    """Tokens of the whole conversation; refuses a prompt that can't be what the cache goes on with.

    As in Transformers the prompt is the whole conversation, of which the cache holds the beginning; or it is what is
    new, and `attention_mask` is longer, as long as both.

    Raises:
        InputError: nothing is new, or the mask is not of this conversation.
    """
    past = 0 if cache is None else cache.get_seq_length()
    mask = call.arguments.get("attention_mask")
    whole = mask is None or mask.shape[-1] == call.tokens or call.arguments.get("inputs_embeds") is not None
    new = call.tokens - past if whole else call.tokens
    if new < 1:
        raise InputError(
            f"the cache holds {past} tokens, the prompt has {call.tokens}: give the whole conversation, with something "
            "new at its end, or crop() the cache"
            if past
            else "the prompt has no tokens: give at least one"
        )
    if mask is not None:
        sequences = Sequences() if cache is None else cache.sequences
        sequences.check(call.sequences, new)
        sequences.check_mask(mask.repeat_interleave(call.copies, 0), call.sequences, new)
    return past + new


def _keep_stop_strings(call: _Call) -> None:
    """Makes the criterion of stop strings here: Transformers hands no tokenizer on beside `custom_generate`.

    It would want one for those of the model's own configuration, too, if the call did not say that there are none.
    """
    strings, kwargs = call.setting("stop_strings"), call.arguments
    if not strings:
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
    prepare, kwargs = plain_method(model, "prepare_inputs_for_generation"), with_cache_named(kwargs)
    inputs: dict[str, Any] = prepare(*args, **kwargs)
    cache = kwargs.get(CACHE)
    if isinstance(cache, TidalCache) and inputs.get(CACHE) is None:
        inputs = prepare(*args, **kwargs | {CACHE: None, "next_sequence_length": None})
        cache.reset()
        inputs[CACHE] = cache
    return inputs


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
