"""A batch of requests, mixed of prompts and decoding ones: which of its tokens are decoded, and what a step needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The tokens of a batch that are decoded, and the requests that are read in full.

    vLLM puts the requests with one new token first, so nearly every batch is: so many requests that decode one token
    each, then prompts. Two kinds of batches are not. After a preemption, vLLM computes a prompt and what was generated
    until then anew, and a chunk can hold both: each generated token attends by the plan again, as it did at first, so
    that a request's answer does not depend on when it was preempted. And a prompt may have a single token left, and
    stand among the decoding requests. Then everything from the first prompt on is read in full, and what the plan says
    of the tokens that it decodes takes the place of that.

    Attributes:
        tokens: the decoded tokens, as indices into the batch; a slice if they are the first of it.
        requests: the request of each, as `tokens`.
        lengths: for each, the tokens of its request up to and with it.
        first_prompt: the first request that has tokens to be read in full; how many there are if none has.
    """

    tokens: slice | Integers
    requests: slice | Integers
    lengths: Integers
    first_prompt: int


def split(query_start_loc: Integers, seq_lens: Integers, prompt_lens: Integers, most: int) -> Split:
    """Splits a batch.

    Args:
        query_start_loc: [requests + 1]; where the new tokens of each request begin in the batch; the first at 0.
        seq_lens: [requests]; tokens of each request, the new ones included.
        prompt_lens: [requests]; tokens of each request's prompt.
        most: tokens that can be decoded at once. The requests that have most of them, and would go beyond it, are read
            in full instead, like prompts.
    """
    new = np.diff(query_start_loc)
    before = seq_lens - new
    of_prompt = np.clip(prompt_lens - before, 0, new)
    order = np.argsort(new - of_prompt, kind="stable")
    beyond = order[np.cumsum((new - of_prompt)[order]) > most]
    of_prompt[beyond] = new[beyond]
    decoded = new - of_prompt
    with_prompt = np.flatnonzero(of_prompt)
    first = int(with_prompt[0]) if len(with_prompt) else len(new)
    if (decoded[:first] == 1).all() and not decoded[first:].any():
        return Split(slice(0, first), slice(0, first), seq_lens[:first], first)
    requests = np.repeat(np.arange(len(new)), new)
    tokens = np.arange(len(requests))
    places = tokens - query_start_loc[:-1][requests]  # among the new tokens of their requests
    decodes = places >= of_prompt[requests]
    tokens, requests, places = tokens[decodes], requests[decodes], places[decodes]
    return Split(tokens, requests, before[requests] + places + 1, first)


@dataclass(frozen=True)
class Prompts:
    """The part of a batch that the engine's own attention reads in full: its last requests.

    Attributes:
        first_token: where it begins in the batch.
        metadata: the engine's own, of these requests alone.
    """

    first_token: int
    metadata: Any


@dataclass(frozen=True)
class Step:
    """The tokens of a batch that the plan decodes; each is the last token of a sequence of its own.

    Attributes:
        tokens: where they are in the batch: a slice, or indices [B].
        block_table: [B, max_blocks], int32; the blocks of each one's sequence.
        lengths: [B], int32; tokens of the sequence, up to and with the decoded one; 0 in the padding of a CUDA graph.
        prompts: what is read in full before; `None` if nothing is. The decoded tokens that lie in it come after it.
    """

    tokens: slice | Tensor
    block_table: Tensor
    lengths: Tensor
    prompts: Prompts | None = None


@dataclass(frozen=True)
class NewTokens:
    """The tokens that a batch adds to its sequences: those whose keys are coded.

    Attributes:
        block_table: [B, max_blocks], int32.
        lengths: [B], int32; tokens of each sequence, the new ones included; 0 in the padding of a CUDA graph.
        new_lengths: [B], int32.
        tokens: they are no more than these, all sequences together.
    """

    block_table: Tensor
    lengths: Tensor
    new_lengths: Tensor
    tokens: int
