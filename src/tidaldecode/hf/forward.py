"""The forward pass of a model with a plan: hands its cache to the attention function, long prompts in chunks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tidaldecode.errors import InputError
from tidaldecode.hf.applied import plain_method
from tidaldecode.hf.attention_function import NAME, own_pass
from tidaldecode.hf.cache import TidalCache
from tidaldecode.hf.cache_name import CACHE, with_cache_named
from tidaldecode.hf.second_pass.correction import correct, step_decoded
from tidaldecode.hf.sequences import PREFILL_CHUNK
from tidaldecode.models import rope_varies

_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
"""Arguments of a forward pass with one entry for each of its tokens."""

_CAPTURED = {CACHE, *"input_ids attention_mask position_ids use_cache return_dict logits_to_keep".split()}
"""Arguments that a captured decode step knows; with others, the step runs uncaptured."""


def tidal_forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The model's forward pass; by the plan when the cache is a `TidalCache`, unchanged otherwise."""
    forward = plain_method(model, "forward")
    arguments = with_cache_named(_named(forward, args, kwargs))
    cache = arguments.get(CACHE)
    return _by_plan(model, cache, arguments) if isinstance(cache, TidalCache) else forward(*args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # of a compiled model: a compiler would follow the cache's lengths, anew at every step
def _by_plan(model: PreTrainedModel, cache: TidalCache, arguments: dict[str, Any]) -> Any:
    tokens, past = _tokens(arguments), cache.get_seq_length()
    cache.ready(tokens.shape[0], tokens.shape[1], arguments.get("attention_mask"))
    _keep_attention(model)
    if tokens.shape[1] > 1 or past == 0:
        correct(model, cache)  # while their tokens are the last ones
        return _prefill(model, cache, arguments)
    if cache.correction is None:
        return _step(model, cache, arguments)
    with cache.kept_if_stopped():
        output = _step(model, cache, arguments)
    positions = arguments.get("position_ids")
    positions = torch.full_like(tokens[:, :1], past) if positions is None else positions
    step_decoded(model, cache, arguments.get("input_ids"), positions)
    return output


def _step(model: PreTrainedModel, cache: TidalCache, arguments: dict[str, Any]) -> Any:
    """A decode step, captured if it may be."""
    tokens = _tokens(arguments)
    if tokens.is_cuda and _may_be_captured(arguments, model.config):
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.full_like(tokens, cache.get_seq_length())
        logits = cache.replay(model, tokens, positions, "step")
        if logits is not None:  # the next step overwrites them
            return CausalLMOutputWithPast(logits=logits.clone(), **{CACHE: cache})
    cache.begin(len(tokens), 1, tokens.device, kind="step")
    return own_pass(model, cache, **arguments)


def _prefill(model: PreTrainedModel, cache: TidalCache, arguments: dict[str, Any]) -> Any:
    """The tokens of a prompt with full attention, one chunk after another."""
    for chunk in _chunks(arguments, model.config):
        tokens, mask = _tokens(chunk), chunk.get("attention_mask")
        batch, new_tokens = tokens.shape[:2]
        new_lengths = None if mask is None else mask[:, -new_tokens:].bool().sum(1)
        cache.begin(batch, new_tokens, tokens.device, new_lengths)
        output = own_pass(model, cache, **chunk)
    return output


def _keep_attention(model: PreTrainedModel) -> None:
    """Sees to it that the layers call the plan's attention, also if another one was written into the configuration."""
    config, of_layers = model.config, model.base_model.config
    if of_layers is not config and of_layers._attn_implementation != NAME:  # of a shallow copy, say
        raise InputError("the model shares its layers with one that lost its plan: call tidaldecode.remove, then apply")
    if config._attn_implementation != NAME:
        model.set_attn_implementation(config._attn_implementation)


def _named(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass by their names."""
    if not args:  # as `generate` calls it, at every step
        return kwargs
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    return {**bound, **bound.pop("kwargs", {})}


def _may_be_captured(arguments: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Whether a decode step asks for logits alone."""
    if arguments.get("input_ids") is None or config.output_hidden_states:
        return False
    if arguments.get("return_dict") is False or arguments.get("use_cache") is False:
        return False
    return all(name in _CAPTURED or value is None or value is False for name, value in arguments.items())


def chunk_size(tokens: int, limit: int = PREFILL_CHUNK) -> int:
    """Size of equal chunks of at most about `limit` tokens; never one that leaves a last chunk of a single token.

    A single token behind a prompt is a decode step, and prefill must stay full attention.
    """
    chunks = -(-tokens // limit)
    size = -(-tokens // chunks)
    while size > 1 and size < tokens and tokens % size == 1:
        size += 1
    return size


def _tokens(arguments: dict[str, Any]) -> Tensor:
    """The new tokens: their ids, [B, N], or their embeddings, [B, N, hidden size]."""
    for name, dimensions in (("input_ids", 2), ("inputs_embeds", 3)):
        tokens: Tensor | None = arguments.get(name)
        if tokens is not None and tokens.ndim != dimensions:
            shape = "[batch, tokens]" if dimensions == 2 else "[batch, tokens, hidden size]"
            raise InputError(f"{name} must be {shape}, not {list(tokens.shape)}")
        if tokens is not None:
            return tokens
    raise InputError("the input has no tokens: give input_ids, or inputs_embeds")


def _chunks(arguments: dict[str, Any], config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The arguments of each forward pass of a prompt."""
    tokens = _tokens(arguments).shape[1]
    size = chunk_size(tokens) if _may_be_split(arguments, config) else tokens
    past = arguments[CACHE].get_seq_length()
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        chunk = dict(arguments)
        for name in _PER_TOKEN:
            if chunk.get(name) is not None:
                chunk[name] = chunk[name][:, start:stop]
        if chunk.get("attention_mask") is not None and size < tokens:
            chunk["attention_mask"] = chunk["attention_mask"][:, : past + stop]
        yield chunk


def _may_be_split(arguments: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Whether the last chunk's output is all that is wanted, and the chunks' positions do not depend on each other.

    `generate` wants the last token's logits alone (`logits_to_keep=1`). Where RoPE's frequencies vary with the context,
    a chunk would be rotated by other ones than its prompt.
    """
    hidden = arguments.get("output_hidden_states") or config.output_hidden_states
    return arguments.get("logits_to_keep") == 1 and not hidden and not rope_varies(config)
