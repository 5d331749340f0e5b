"""What decode steps lose under a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidaldecode.calibrate.stretches import Stretch
from tidaldecode.methods.protocol import Attention


@dataclass(frozen=True)
class Loss:
    """What decode steps lose against full attention, the mean over them, in nats.

    Attributes:
        divergence: Kullback-Leibler divergence `sum of p · ln(p / q)` of the next-token distribution `q` from full
            attention's `p`, over all steps: those of the text, of the probes, and of full attention's own
            answers.
        text_divergence: the same over the steps of the text alone: what `gap` would be if full attention were right,
            without the chance of which tokens the text happens to go on with.
        gap: `ln p(token) - ln q(token)` of the text's own next tokens, over the steps of the text.
    """

    divergence: float
    text_divergence: float
    gap: float


def mean_loss(stretches: Sequence[Stretch], attention: Attention) -> Loss:
    """The loss under an attention, averaged over the steps of all stretches.

    Args:
        stretches: at least one.
        attention: of a method, for one sequence.
    """
    losses = [_losses(stretch, attention) for stretch in stretches]
    divergences, gaps = zip(*losses, strict=True)
    of_text = [divergence[: len(gap)] for divergence, gap in losses]
    return Loss(*(float(torch.cat(steps).mean()) for steps in (divergences, of_text, gaps)))


def _losses(stretch: Stretch, attention: Attention) -> tuple[Tensor, Tensor]:
    """Divergence of every step [n], and gap of every step of the text [text_steps]."""
    divergences, gaps, start = [], [], 0
    for log_probs in stretch.log_probs(attention):
        end = start + len(log_probs)
        full = stretch.full_log_probs[start:end]
        tokens = stretch.tokens[0, start + 1 : end + 1, None].to(full.device)
        divergences.append((full.exp() * (full - log_probs)).sum(1))
        gaps.append((full - log_probs).gather(1, tokens)[:, 0])
        start = end
    return torch.cat(divergences), torch.cat(gaps)[: stretch.text_steps]
