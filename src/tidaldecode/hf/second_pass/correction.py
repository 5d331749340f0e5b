"""A chunk of tokens with full attention in every layer, and cache correction by it (TidalDecode, arXiv 2410.05076).

Hidden states of sparsely decoded tokens drift from full attention's, and so do their K and V. Every `interval` decoded
tokens, those tokens run again as one chunk with full attention in all layers, and their rows of the cache are written
anew. The chunk's logits are full attention's: lossless decoding reads them.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tidaldecode.errors import InputError
from tidaldecode.hf.attention_function import own_pass
from tidaldecode.hf.cache import TidalCache
from tidaldecode.models import rope_varies, sliding_windows


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
    batch, tokens = token_ids.shape
    cache.ready(batch, tokens)
    if capture and token_ids.is_cuda and new_lengths is None:
        logits = cache.replay(model, token_ids, position_ids, "full")
        if logits is not None:
            return logits
    cache.begin(batch, tokens, token_ids.device, new_lengths)
    last = {"logits_to_keep": 1} if last_logits and model._supports_logits_to_keep() else {}
    return own_pass(model, cache, input_ids=token_ids, position_ids=position_ids, use_cache=True, **last).logits


def step_decoded(model: PreTrainedModel, cache: TidalCache, token_ids: Tensor | None, positions: Tensor) -> None:
    """Counts a decode step of a cache that is corrected, and corrects it if it is time.

    Args:
        token_ids: [B, 1], int64; the token that was decoded into the cache.
        positions: [B, 1] or [1, 1], int64; its positions.

    Raises:
        InputError: there are no token ids.
    """
    assert cache.correction is not None
    if token_ids is None:
        raise InputError("cache correction needs input_ids: embeddings alone can't be decoded with it")
    cache.correction.add(token_ids, positions)
    if len(cache.correction) >= cache.correction.interval:
        correct(model, cache)


def correct(model: PreTrainedModel, cache: TidalCache) -> None:
    """Runs the tokens that were decoded since the latest correction again, if there are any.

    A pass that is stopped leaves the cache whole: some layers hold corrected K and V, the others those of decoding.
    """
    if not cache.correction:
        return
    ids, positions = cache.correction.take_out()
    tokens = ids.shape[1]
    with cache.kept_if_stopped():
        cache.rewind(cache.get_seq_length() - tokens, cache.sequences.lengths - tokens)
        full_pass(model, cache, ids, positions, last_logits=True, capture=tokens == cache.correction.interval)


def check_second_pass(config: PreTrainedConfig, option: str) -> None:
    """Refuses a model whose tokens can't run a second time.

    Args:
        option: what asked for it, for the message.

    Raises:
        InputError: some layers keep a sliding window, or RoPE's frequencies go by the length of the pass.
    """
    if any(window is not None for window in sliding_windows(config)):
        raise InputError(f"{config.model_type!r} has sliding-window layers, which can't forget: leave out {option}")
    if rope_varies(config):
        raise InputError(f"{config.model_type!r} has RoPE frequencies that vary with the context: leave out {option}")
