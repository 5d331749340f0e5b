"""Which tokens of a batch are decoded: those behind a request's prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The tokens of a batch, as those of prompts and those that were generated.

    A chunk can hold both: after a preemption, vLLM computes the prompt and what was generated until then anew. Each
    generated token attends by the plan again, as it did at first, so that a request's answer does not depend on when it
    was preempted.

    Attributes:
        prompt_tokens: tokens of prompts, as indices into the batch.
        prompt_requests: the requests that have such tokens.
        prompt_counts: how many each of them has.
        decode_tokens: the other tokens, as indices into the batch.
        decode_requests: the request of each.
        decode_lengths: for each, the tokens of its request up to and with it.
    """

    prompt_tokens: Integers
    prompt_requests: Integers
    prompt_counts: Integers
    decode_tokens: Integers
    decode_requests: Integers
    decode_lengths: Integers


def split(query_start_loc: Integers, seq_lens: Integers, prompt_lens: Integers, most: int) -> Split:
    """Splits a batch.

    Args:
        query_start_loc: [requests + 1]; where the new tokens of each request begin in the batch.
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
    request = np.repeat(np.arange(len(new)), new)
    token = np.arange(len(request))
    place = token - query_start_loc[:-1][request]  # among the new tokens of its request
    prompt = place < of_prompt[request]
    decoded = ~prompt
    has_prompt = np.flatnonzero(of_prompt)
    return Split(
        prompt_tokens=token[prompt] + query_start_loc[0],
        prompt_requests=has_prompt,
        prompt_counts=of_prompt[has_prompt],
        decode_tokens=token[decoded] + query_start_loc[0],
        decode_requests=request[decoded],
        decode_lengths=(before[request] + place + 1)[decoded],
    )


def as_slice(indices: Integers) -> slice | None:
    """Indices that follow each other, as a slice."""
    start = int(indices[0]) if len(indices) else 0
    follow = len(indices) > 0 and np.array_equal(indices, np.arange(start, start + len(indices)))
    return slice(start, start + len(indices)) if follow else None
