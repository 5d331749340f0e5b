"""Prompts that are read once, with full attention, and the loss of the decode steps behind them under any plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.calibrate.settings import Probes
from tidaldecode.errors import InputError
from tidaldecode.evaluate.scoring import not_finite, step_logits
from tidaldecode.hf import TidalCache
from tidaldecode.hf.cache import Mark
from tidaldecode.methods.tidal import Attention
from tidaldecode.plans.find import find_plan
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import read_prompt


@dataclass(frozen=True)
class Loss:
    """What decode steps lose against full attention, the mean over them, in nats.

    Attributes:
        divergence: Kullback-Leibler divergence `sum of p · ln(p / q)` of the next-token distribution `q` from full
            attention's `p`, over all steps: those of the text and of the probes.
        text_divergence: the same over the steps of the text alone: what `gap` would be if full attention were right,
            without the chance of which tokens the text happens to go on with.
        gap: `ln p(token) - ln q(token)` of the text's own next tokens, over the steps of the text.
    """

    divergence: float
    text_divergence: float
    gap: float


@dataclass(frozen=True)
class Prompt:
    """One window of a text: its beginning in a cache, and its last tokens, to be decoded.

    Attributes:
        cache: holds the prompt.
        mark: the end of the prompt in the cache.
        steps: [1, n + 1]; the tokens that are decoded, and the last one, which is only predicted.
        text_steps: how many of the n steps predict the text's own tokens; the rest are probes.
        log_probs: [n, V], float32; full attention's next-token distributions.
    """

    cache: TidalCache
    mark: Mark
    steps: Tensor
    text_steps: int
    log_probs: Tensor

    def loss(self, model: PreTrainedModel, attention: Attention) -> tuple[Tensor, Tensor]:
        """Divergence of every step [n], and gap of every step of the text [text_steps], under an attention."""
        divergences, gaps, start = [], [], 0
        for log_probs in _log_probs(model, self.cache, self.mark, self.steps, attention):
            full = self.log_probs[start : start + len(log_probs)]
            divergences.append((full.exp() * (full - log_probs)).sum(1))
            tokens = self.steps[0, start + 1 : start + 1 + len(log_probs), None].to(full.device)
            gaps.append((full - log_probs).gather(1, tokens)[:, 0])
            start += len(log_probs)
        return torch.cat(divergences), torch.cat(gaps)[: self.text_steps]


def read_prompts(
    model: PreTrainedModel,
    text: Text,
    starts: Sequence[int],
    context: int,
    decode: int,
    probes: Probes,
    generator: torch.Generator,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Prompt]:
    """Reads the windows of a text that begin at `starts`, with full attention.

    Args:
        model: with a plan applied.
        context: tokens of a window, the probes' included.
        decode: steps that predict the text's own tokens.
        probes: follow behind the text.
        generator: of the probes' places.
        on_progress: told how many windows are read.

    Raises:
        InputError: a log probability is not finite.
    """
    prompts = []
    for number, start in enumerate(starts):
        on_progress(number)
        window = text.window(start, context - probes.steps)
        prompt_tokens = window.shape[1] - decode - 1
        window = torch.cat([window, *_repeated(window[:, :prompt_tokens], probes, generator)], 1)
        cache = TidalCache(model.config, find_plan("full", model.config), context)
        steps = read_prompt(model, cache, window, decode + probes.steps)
        mark = cache.mark()
        log_probs = torch.cat(_log_probs(model, cache, mark, steps, cache.attention))
        if not log_probs.isfinite().all():
            raise InputError(not_finite(model.dtype))
        prompts.append(Prompt(cache, mark, steps, decode, log_probs))
    return prompts


def _repeated(prompt: Tensor, probes: Probes, generator: torch.Generator) -> list[Tensor]:
    """Stretches of a prompt [1, T], one from each of as many equal parts of it, in random order."""
    part = (prompt.shape[1] - probes.tokens) // max(1, probes.count)
    starts = [
        number * part + int(torch.randint(max(1, part), (), generator=generator)) for number in range(probes.count)
    ]
    order = torch.randperm(probes.count, generator=generator).tolist()
    return [prompt[:, starts[number] : starts[number] + probes.tokens] for number in order]


def _log_probs(
    model: PreTrainedModel, cache: TidalCache, mark: Mark, steps: Tensor, attention: Attention
) -> list[Tensor]:
    """Next-token distributions of the steps, in parts [m, V], float32; the cache stands at `mark` again afterwards."""
    cache.attention = attention
    with torch.inference_mode():
        parts = [logits[0].float().log_softmax(1) for logits in step_logits(model, cache, steps[:, :-1])]
    cache.go_back(mark)
    return parts


def mean_loss(model: PreTrainedModel, prompts: Sequence[Prompt], attention: Attention) -> Loss:
    """The loss under an attention, averaged over the steps of all prompts.

    Args:
        model: that read the prompts.
        prompts: at least one.
        attention: of a method, for one sequence.
    """
    losses = [prompt.loss(model, attention) for prompt in prompts]
    divergences, gaps = zip(*losses, strict=True)
    of_text = [divergence[: len(gap)] for divergence, gap in losses]
    return Loss(*(float(torch.cat(steps).mean()) for steps in (divergences, of_text, gaps)))
