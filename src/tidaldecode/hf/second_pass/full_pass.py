"""A chunk of tokens behind those of the cache, with full attention in every layer: correction and verification."""

from __future__ import annotations

from torch import Tensor, no_grad
from transformers import PreTrainedModel

from tidaldecode.errors import InputError
from tidaldecode.hf.applied import plain_forward
from tidaldecode.hf.cache import TidalCache
from tidaldecode.hf.captured import captured_chunk


def full_pass(
    model: PreTrainedModel,
    cache: TidalCache,
    token_ids: Tensor,
    position_ids: Tensor,
    *,
    new_lengths: Tensor | None = None,
    last_logits: bool = False,
    capture: bool = True,
) -> Tensor:
    """Runs tokens through the model, each attending to all before it, and adds their K and V to the cache.

    Args:
        model: a model with a plan.
        cache: holds what comes before the tokens.
        token_ids: [B, N], int64, on the model's device; left-padded where `new_lengths` says so.
        position_ids: [B, N], int64.
        new_lengths: [B], integer; tokens of each sequence, without padding; `None` for all N.
        last_logits: only the last token's logits are wanted.
        capture: on a GPU, capture the pass over so many tokens in a CUDA graph if there is none; `False` for passes
            of a length that does not come again.

    Returns:
        Logits, [B, N, V] or [B, 1, V], dtype of the model. Those of a captured pass are overwritten by its next one.

    Raises:
        InputError: memory is too short for the cache to grow, or the model does not pass on what is needed.
    """
    tokens = token_ids.shape[1]
    cache.ready(len(token_ids), tokens)
    if capture and token_ids.is_cuda and new_lengths is None:
        graph = captured_chunk(model, cache, token_ids, position_ids)
        if graph is not None:
            logits = graph.replay(token_ids, position_ids)
            cache.count(tokens)
            return logits
    cache.begin_chunk(tokens, new_lengths)
    last = {"logits_to_keep": 1} if last_logits and model._supports_logits_to_keep() else {}
    with no_grad():
        output = plain_forward(model)(
            input_ids=token_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            tidal_cache=cache,
            **last,
        )
    if not cache.attended_everywhere():
        raise InputError(f"{type(model).__name__} does not pass on what tidaldecode needs: it can't work with it")
    return output.logits
