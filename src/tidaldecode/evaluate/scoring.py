"""Teacher-forced decoding in one pass: given the text, the logits of all decode steps at once.

Each position of the pass stands for the decode step that would have added its token. The tokens' K and V come from the
pass itself, as they come from the steps before in decoding, and each position attends as that step would: to the
operations the steps are sequences that share one block of the cache and differ in length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.errors import InputError
from tidaldecode.hf import TidalCache, applied_plan
from tidaldecode.hf.attention_function import own_pass
from tidaldecode.hf.second_pass import Correction, full_pass
from tidaldecode.hf.sequences import PREFILL_CHUNK
from tidaldecode.models import model_shape, rope_varies

_MOST_BYTES = {"cuda": 2**29}  # of the scores that tokens are chosen by, and of the logits
_MOST_BYTES_ELSEWHERE = 2**27


@dataclass(frozen=True)
class TokenScores:
    """What a model says of given tokens.

    Attributes:
        log_probs: [n], float32; natural logarithm of each token's probability after those before it.
        greedy: [n], bool; whether it was the most probable.
    """

    log_probs: Tensor
    greedy: Tensor


def step_logits(
    model: PreTrainedModel, cache: TidalCache, token_ids: Tensor, interval: int | None = None
) -> Iterator[Tensor]:
    """The logits that decoding given tokens step by step under `cache.attention` would give.

    The cache holds the tokens afterwards: `cache.crop(-n)` takes them away, and then another `cache.attention` can go
    on from the same prompt. Between two parts that are yielded the cache must be left alone.

    Args:
        model: a model with a plan applied (any: the cache's attention decides).
        cache: a cache that holds one prompt, read by the model.
        token_ids: [1, n]; the tokens of the steps. The last token of a prompt is one of them if it is to be decoded
            under the method too.
        interval: decoded tokens between two corrections of the cache, which run those again with full attention; those
            behind the last whole interval are not corrected. `None` for no corrections.

    Yields:
        [1, m, V], dtype of the model; parts of the n positions, in order, as many at once as memory allows.

    Raises:
        InputError: the model has no plan, there are several sequences or no tokens, or the cache has no room.
    """
    _check(model, cache, token_ids)
    most = 1 if rope_varies(model.config) else steps_at_once(model, cache.capacity)
    for stretch in torch.split(token_ids.to(model.device), interval or token_ids.shape[1], 1):
        for ids in torch.split(stretch, most, 1):
            cache.ready(1, ids.shape[1])
            cache.begin(1, ids.shape[1], ids.device, kind="steps")
            parts = [own_pass(model, cache, input_ids=ids, use_cache=True).logits]
            yield parts.pop()  # nothing here holds it while the next part is computed
        if stretch.shape[1] == interval:
            start = cache.get_seq_length() - interval
            cache.rewind(start, cache.sequences.lengths - interval)
            positions = torch.arange(start, start + interval, device=stretch.device)[None]
            full_pass(model, cache, stretch, positions, last_logits=True, capture=False)


def own_step_logits(
    model: PreTrainedModel, cache: TidalCache, token_ids: Tensor, interval: int | None = None
) -> Iterator[Tensor]:
    """As `step_logits`, by the model's own decode steps and corrections: on a GPU graphs are replayed."""
    _check(model, cache, token_ids)
    cache.correction = None if interval is None else Correction(interval)
    try:
        for ids in torch.split(token_ids.to(model.device), 1, 1):
            yield model(ids, past_key_values=cache).logits
    finally:
        cache.correction = None


def score_tokens(
    model: PreTrainedModel,
    cache: TidalCache,
    token_ids: Tensor,
    correction_interval: int | None = None,
    own_steps: bool = False,
) -> TokenScores:
    """Log probabilities of given tokens, as decoding them step by step under `cache.attention` would give them.

    Args:
        model, cache: as for `step_logits`; the cache holds all tokens but the last afterwards.
        token_ids: [1, n + 1]; the first is decoded and not scored: the last token of the prompt, which the cache does
            not hold yet.
        correction_interval: decoded tokens after which those run again with full attention; `None` for never.
        own_steps: decode step by step instead of many steps in a pass.

    Returns:
        Scores of the n tokens behind the first, on the model's device.

    Raises:
        InputError: as `step_logits`, or a log probability is not finite.
    """
    expected = token_ids[0, 1:].to(model.device)
    log_probs, greedy, start = [], [], 0
    decode = own_step_logits if own_steps else step_logits
    for part in decode(model, cache, token_ids[:, :-1], correction_interval):
        logits = part[0].float()  # [m, V]
        token = expected[start : start + len(logits), None]
        log_probs.append((logits.gather(1, token) - logits.logsumexp(1, keepdim=True))[:, 0])
        greedy.append(logits.argmax(1) == token[:, 0])
        start += len(logits)
        del part, logits
    scores = TokenScores(torch.cat(log_probs), torch.cat(greedy))
    if not scores.log_probs.isfinite().all():
        raise InputError(not_finite(model.dtype))
    return scores


def not_finite(dtype: torch.dtype) -> str:
    """What to say of such a likelihood: bfloat16 reaches as far as float32, only float16 overflows where they don't."""
    if dtype == torch.float16:
        return "the likelihood is not finite: float16 overflows; give --dtype bfloat16 or float32"
    name = str(dtype).removeprefix("torch.")
    return f"the likelihood is not finite: the model's weights are damaged, for {name} does not overflow"


def steps_at_once(model: PreTrainedModel, capacity: int) -> int:
    """How many decode steps one pass stands for: so many that scores and logits in float32 stay small.

    Args:
        model: gives heads, vocabulary and device.
        capacity: tokens of the cache.
    """
    numbers = max(model_shape(model.config).num_query_heads * capacity, model.config.vocab_size)
    most = _MOST_BYTES.get(model.device.type, _MOST_BYTES_ELSEWHERE)
    return max(1, min(PREFILL_CHUNK, most // (4 * numbers)))


def _check(model: PreTrainedModel, cache: TidalCache, token_ids: Tensor) -> None:
    if applied_plan(model) is None:
        raise InputError("the model has no plan: call tidaldecode.apply first")
    if len(token_ids) != 1:
        raise InputError(f"decode steps are scored for one sequence at a time, not {len(token_ids)}")
    if token_ids.shape[1] == 0:
        raise InputError("there are no tokens to score")
