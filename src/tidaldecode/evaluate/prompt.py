"""A prompt in a cache, from which each method decodes the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.evaluate.scoring import TokenScores, score_tokens
from tidaldecode.hf import TidalCache
from tidaldecode.methods.method import Method
from tidaldecode.models import model_shape
from tidaldecode.plans.find import find_plan


def read_prompt(model: PreTrainedModel, cache: TidalCache, window: Tensor, decode: int) -> Tensor:
    """Fills the cache with a window's prompt but for its last token, which is decoded. Returns the rest.

    Args:
        model: with a plan applied.
        cache: emptied first.
        window: [1, context], int64.
        decode: tokens of the window that decode steps predict; 0 where what they predict lies behind it.

    Returns:
        [1, decode + 1].
    """
    cache.reset()
    prompt, rest = window[:, : -decode - 1], window[:, -decode - 1 :]
    if prompt.shape[1]:
        with torch.inference_mode():
            model(prompt.to(model.device), past_key_values=cache, logits_to_keep=1)
    return rest


class HeldPrompt:
    """A prompt but for its last token, read with full attention once for all methods.

    Args:
        model: with a plan applied.
        capacity: tokens of the longest prompt and what is decoded behind it.

    Attributes:
        window: [1, context]; the tokens of which the prompt is the first part.
        rest: [1, n]; the last token of the prompt, and those that follow.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model = model
        self.cache = TidalCache(model.config, find_plan("full", model.config), capacity)
        self.window = self.rest = torch.empty(1, 0, dtype=torch.int64)

    def read(self, window: Tensor, decode: int) -> None:
        """Reads another prompt, see `read_prompt`."""
        self.window, self.rest = window, read_prompt(self.model, self.cache, window, decode)

    def attend_by(self, method: Method, context: int) -> None:
        """Lets decoding go on by a method; a budget that is a fraction is one of `context` tokens."""
        self.cache.attention = method.attention(model_shape(self.model.config), context)

    def scores(self, tokens: Tensor, **options: Any) -> TokenScores:
        """Decodes the given tokens, and takes them out of the cache again, see `score_tokens`."""
        mark = self.cache.mark() if self.cache.get_seq_length() else None  # a prompt of one token is not read
        with torch.no_grad():  # not inference mode: graphs that are captured here serve `generate` too
            scores = score_tokens(self.model, self.cache, tokens, **options)
        if mark is None:
            self.cache.reset()
        else:
            self.cache.go_back(mark)
        return scores
