"""Logits processors beside drafted tokens, which may be taken back: which ones can't be asked, or may mind it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from tidaldecode.errors import InputError

_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


def check_processors(processors: LogitsProcessorList, prompt: Tensor, vocabulary: int) -> None:
    """Refuses logits processors whose scores depend on more than their arguments.

    Transformers' own are known. One of somebody else's is called once with the prompt and zeros: if an attribute of it
    changes, it keeps state.

    Args:
        prompt: [B, W], int64.
        vocabulary: entries of the logits.

    Raises:
        InputError: a processor keeps state between calls, or holds what can't be copied and compared.
    """
    for processor in processors:
        if isinstance(processor, _STATEFUL) or (_is_users(processor) and _changes(processor, prompt, vocabulary)):
            raise InputError(
                f"the logits processor {type(processor).__name__} keeps state between calls, which can't be taken back "
                "with refused tokens: leave out lossless, or the processor"
            )


def may_mind(processors: LogitsProcessorList) -> bool:
    """Whether one may mind being asked what follows an end of sequence: a user's own, or that of a user's function."""
    return any(isinstance(one, PrefixConstrainedLogitsProcessor) or _is_users(one) for one in processors)


def _is_users(processor: object) -> bool:
    return not type(processor).__module__.startswith("transformers.")


def _changes(processor: Any, prompt: Tensor, vocabulary: int) -> bool:
    try:
        before = copy.deepcopy(getattr(processor, "__dict__", {}))
        _same(before, before)
    except Exception as error:  # whatever the attributes' own methods raise: locks, arrays, cycles
        raise InputError(
            f"the logits processor {type(processor).__name__} can't be looked at for state between calls "
            f"({type(error).__name__}): leave out lossless, or the processor"
        ) from None
    processor(prompt.clone(), torch.zeros(len(prompt), vocabulary, device=prompt.device))
    return not _same(before, getattr(processor, "__dict__", {}))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if hasattr(one, "__dict__"):  # a deep copy may not be equal to what it is a copy of: look inside
        return type(one) is type(other) and _same(vars(one), vars(other))
    return bool(one == other) or (one != one and other != other)  # NaN is the same as NaN
