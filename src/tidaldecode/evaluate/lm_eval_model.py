"""A model of lm-eval whose answers are decoded under a method; wants lm-eval, so import it where it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.methods.method import Method

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Of lm-eval: context and continuation as text, and as token ids."""


class MethodLM(HFLM):
    """lm-eval's own Hugging Face model, but for the attention of what it decodes.

    Tokens, truncation (from the left), stop sequences and chat template are lm-eval's. A prompt but for its last token
    is read with full attention; the last token and what follows are decoded under `method`, so that every token of an
    answer is the method's. What follows is

    - of `generate_until`: the answer, by the model's `generate`;
    - of `loglikelihood`: the continuation, teacher-forced in one pass (`tidaldecode.evaluate.scoring`), float32;
    - of `loglikelihood_rolling`: all of the text, window by window. The prompt is the one token before a window; but
      the last of several windows has few tokens left to score, and lm-eval fills its prompt up with the tokens before
      them, which are read with full attention although they were decoded, and scored, in the window before.

    A budget that is a fraction is one of the prompt, and of the continuation too where there is one.

    Args:
        model: with a plan applied.
        tokenizer: the model's.

    Attributes:
        method: may be changed between requests.
        on_request: told how many requests of how many are done.
        truncated: requests so far, of this method, whose prompt lost its start, for it did not fit the model's
            positions.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.on_request: Callable[[int, int], None] = lambda done, total: None
        self._held: HeldPrompt | None = None
        self._attends: Method | None = None
        self._done, self._total = 0, 0
        self.start(Method.named("full"))

    def start(self, method: Method) -> None:
        """Counts anew, of what is decoded under a method."""
        self.method, self.truncated = method, 0
        self._steps, self._read = 0, 0.0

    @property
    def kv_read_fraction(self) -> float | None:
        """Share of K and V that a decode step read, the mean over all steps so far; `None` before the first."""
        return round(self._read / self._steps, 6) if self._steps else None

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, decoded under the method. The bar is `on_request`'s."""
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask of a prompt, [1, T]: of its last `left_truncate_len` tokens, and it is counted if cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is None or ids.shape[1] <= left_truncate_len:
            return ids, mask
        self.truncated += 1
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        held = self._hold(max_length)
        self._attend(held, context.shape[1])
        held.read(context, decode=0)
        output = super()._model_generate(context, max_length, stop, past_key_values=held.cache, **options)
        self._count_steps(held, context.shape[1], output.shape[1] - context.shape[1])
        self._count_request()
        return output

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Sum of the log probabilities of each continuation, and whether greedy decoding would say it.

        Raises:
            InputError: a continuation has more tokens than the model has positions.
        """
        if override_bs is None:  # else one window of many, of `loglikelihood_rolling`
            self._done, self._total = 0, len(requests)
        texts = [self._fitting(context, continuation) for _, context, continuation in requests]
        held = self._hold(max(map(len, texts)))
        read: list[int] | None = None
        answers = []
        for (_, _, continuation), text in zip(requests, texts, strict=True):
            decode = len(continuation)
            if text[: -decode - 1] != read:  # choices of one question share it
                read = text[: -decode - 1]
                held.read(torch.tensor([text]), decode)
            self._attend(held, len(text))
            scores = held.scores(torch.tensor([text[-decode - 1 :]]))
            self._count_steps(held, len(text) - decode, decode)
            answers.append((float(scores.log_probs.sum()), bool(scores.greedy.all())))
            if override_bs is None:
                self._count_request()
        return answers

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """As many of the last tokens as the model can read and score."""
        if len(continuation) > self.max_length:
            raise InputError(
                f"a continuation of {len(continuation)} tokens is beyond the model's {self.max_length} positions"
            )
        text = context + continuation
        self.truncated += len(text) > self.max_length + 1
        return text[-self.max_length - 1 :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each text, decoded under the method; the class says which few tokens are not."""
        self._done, self._total = 0, len(requests)
        answers = []
        for request in requests:  # one at a time, for lm-eval does not say which request a window is of
            answers += super().loglikelihood_rolling([request], disable_tqdm=True)
            self._count_request()
        return answers

    def _hold(self, capacity: int) -> HeldPrompt:
        """The cache of the requests before, or a larger one."""
        if self._held is None or self._held.cache.capacity < capacity:
            self._held = self._attends = None  # frees it before the next is allocated
            self._held = HeldPrompt(self.model, capacity)
        return self._held

    def _attend(self, held: HeldPrompt, context: int) -> None:
        """Lets the cache go on by the method; a captured decode step stays valid where nothing changes."""
        tokens = self.method.whole_tokens(context)
        method = self.method if tokens is None else replace(self.method, budget=tokens)
        if self._attends != method:
            held.attend_by(method, context)
            self._attends = method

    def _count_steps(self, held: HeldPrompt, first: int, steps: int) -> None:
        """Counts what steps read, of contexts of `first` tokens and more, the new one among them."""
        self._read += sum(held.cache.attention.kv_read_fraction(first + step) for step in range(steps))
        self._steps += steps

    def _count_request(self) -> None:
        self._done += 1
        self.on_request(self._done, self._total)
