"""Answers that a model writes token by token under a method, and how probable full attention finds them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tidaldecode.evaluate.generation_settings import Sampling
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.methods.method import Method
from tidaldecode.results.rows import mean_and_error


@dataclass(frozen=True)
class OwnAnswer:
    """A prompt, and full attention's own answer to it.

    Attributes:
        prompt: token ids.
        answer: token ids, the end of sequence among them if it came.
        log_prob: mean natural logarithm of a token's probability by full attention.
        seed: of the random numbers that it was sampled with, if it was.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    log_prob: float
    seed: int = 0


@dataclass(frozen=True)
class Surprise:
    """How much less probable full attention finds a method's answers than its own, nats per token.

    Attributes:
        mean: over the questions.
        stderr: its standard error over them; `None` of one.
        each: question by question.
    """

    mean: float
    stderr: float | None
    each: tuple[float, ...]


def own_answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling | None = None
) -> list[OwnAnswer]:
    """Full attention's answers to prompts.

    Args:
        model: with a plan applied (any).
        prompts: token ids, two at least each: `Asked.token_ids` of `tidaldecode.texts.questions.ask`.
        sampling: `None` for greedy decoding.
    """
    sampling, full, answers = sampling or Sampling(), Method.named("full"), []
    held = HeldPrompt(model, max(map(len, prompts)) + max_new_tokens)
    for number, prompt in enumerate(prompts):
        held.read(torch.tensor([prompt]), decode=0)
        seed = seed_of(sampling.seed, str(number))
        answer = write_answer(held, full, max_new_tokens, sampling, seed)
        answers.append(OwnAnswer(tuple(prompt), tuple(answer), full_log_prob(held, answer), seed))
    return answers


def surprise(
    model: PreTrainedModel,
    own: Sequence[OwnAnswer],
    method: Method,
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> Surprise:
    """The surprise of a method on prompts that full attention has answered.

    Args:
        model, max_new_tokens, sampling: as of `own_answers`.
        method: `Method.named("tidal", plan=plan)` of a plan.
    """
    held, each = HeldPrompt(model, max(len(one.prompt) for one in own) + max_new_tokens), []
    for one in own:
        held.read(torch.tensor([one.prompt]), decode=0)
        answer = write_answer(held, method, max_new_tokens, sampling or Sampling(), one.seed)
        each.append(one.log_prob - full_log_prob(held, answer))
    return Surprise(*mean_and_error(each), tuple(each))


def write_answer(held: HeldPrompt, method: Method, max_new_tokens: int, sampling: Sampling, seed: int) -> list[int]:
    """Token ids that the model writes behind the held prompt, whose last token the method decodes too.

    Nothing but the end of sequence and the number of tokens stops it, and the model's own penalty for repetition is
    off. The cache is as before.
    """
    held.attend_by(method, held.window.shape[1])
    prompt, mark = held.window.to(held.model.device), held.cache.mark()
    torch.manual_seed(seed)
    output = held.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=held.cache,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        pad_token_id=0,
        **sampling.options(),
    )
    held.cache.go_back(mark)
    return output[0, prompt.shape[1] :].tolist()


def full_log_prob(held: HeldPrompt, answer: Sequence[int]) -> float:
    """Mean log probability of an answer's tokens by full attention, teacher-forced behind the held prompt."""
    held.attend_by(Method.named("full"), held.window.shape[1])
    tokens = torch.cat([held.rest, torch.tensor([answer])], 1)
    return float(held.scores(tokens).log_probs.double().mean())


def seed_of(seed: int, question: str, draw: int = 0) -> int:
    """Random numbers of a question: the same for every method, others for another draw."""
    return random.Random(f"{seed} {question} {draw}").getrandbits(63)
