"""Which tokens of a batch are decoded: those behind a request's prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
