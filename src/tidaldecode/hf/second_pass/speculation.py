"""The rule of speculative decoding: which of the drafted tokens are full attention's too.

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023, algorithm 1, for
several sequences at once, each of which accepts its own number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accept_greedy(drafted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The longest prefix that full attention's greedy decoding agrees with, and the token that it puts behind it.

    Args:
        drafted: [B, N], int64; the drafted tokens.
        target: [B, N + 1], int64; full attention's most probable token at each position, those behind `drafted` first.

    Returns:
        Accepted tokens, [B], int64, 0 to N; and the token behind them, [B], int64.
    """
    accepted = _leading(drafted == target[:, :-1])
    return accepted, target.gather(1, accepted[:, None])[:, 0]


def accept_sampled(drafted: Tensor, draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts and resamples so that the tokens are distributed as full attention's own.

    With `q` the distribution that token `x` was drafted from and `p` full attention's, `x` is accepted with probability
    `min(1, p(x) / q(x))`; the first token that is not is drawn anew from `max(p - q, 0)`, normalized. Behind N accepted
    tokens one more is drawn from `p`.

    Args:
        drafted: [B, N], int64; tokens drawn from `draft`.
        draft: [B, N, V], float32; the distributions that they were drawn from.
        target: [B, N + 1, V], float32; full attention's distributions at the same positions, and behind the last one.

    Returns:
        Accepted tokens, [B], int64, 0 to N; and the token behind them, [B], int64.
    """
    token = drafted[..., None]
    p, q = target[:, :-1].gather(2, token)[..., 0], draft.gather(2, token)[..., 0]
    accepted = _leading(torch.rand_like(p) * q < p)
    rest = (p := _at(target, accepted)) - _at(draft, accepted)
    rest.clamp_(min=0)
    # where rounding alone made p differ from q, nothing may be left
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)
    return accepted, torch.multinomial(rest, 1)[:, 0]


def _at(distributions: Tensor, position: Tensor) -> Tensor:
    """The distribution of each sequence at its own position [B], [B, V]; zeros behind the last, where there is none.

    Those of all positions, [B, N, V], are large, and are not copied for the sake of one row.
    """
    batch, positions, vocabulary = distributions.shape
    if positions == 0:
        return distributions.new_zeros(batch, vocabulary)
    rows = torch.arange(batch, device=distributions.device)
    here = distributions[rows, position.clamp(max=positions - 1)]
    return here.masked_fill_((position == positions)[:, None], 0)


def _leading(flags: Tensor) -> Tensor:
    """How many entries of each row are true before the first that is not, [B]."""
    return flags.long().cumprod(1).sum(1)
