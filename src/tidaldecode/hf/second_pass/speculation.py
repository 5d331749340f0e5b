"""The rules of speculative decoding: how many tokens to draft, and which of them are full attention's too.

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023, algorithm 1, for
several sequences at once, each of which accepts its own number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tidaldecode.errors import InputError

Lossless = int | Literal["auto"]

_LENGTHS = (1, 2, 4, 8, 16)  # few, for on a GPU each has a captured pass of its own
_DRAFT_STEP = 0.4  # cost of a draft step over that of a pass with full attention, as at long contexts on a GPU
_MEMORY = 0.9  # weight of what was seen before, each round


class DraftLength:
    """Tokens to draft in the next round: the same always, or by the acceptance seen (`auto`).

    `auto` takes the length that gives most tokens for its cost, if each drafted token is accepted with the same
    probability: after T drafted tokens `(1 - a^(T+1)) / (1 - a)` are expected (Leviathan et al., equation 1). It looks
    at no clock, so that a seed gives the same tokens each time.

    Args:
        lossless: the length, or `auto`.
        most: new tokens that are wanted; no round drafts more.

    Raises:
        InputError: neither.
    """

    def __init__(self, lossless: Lossless, most: int | None = None) -> None:
        fixed = isinstance(lossless, int) and not isinstance(lossless, bool) and lossless >= 1
        if not fixed and lossless != "auto":
            raise InputError(f"lossless {lossless!r}: give the tokens to draft in a round, at least 1, or 'auto'")
        self.auto = lossless == "auto"
        self.longest = max(_LENGTHS) if self.auto else int(lossless)
        if most is not None:
            self.longest = min(self.longest, most)
        self._length = min(8, self.longest) if self.auto else self.longest
        self._accepted, self._tested = 7.0, 8.0  # what a plan made for the model does, until its own rounds say more

    def __int__(self) -> int:
        return self._length

    def saw(self, drafted: int, accepted: list[int]) -> None:
        """Learns from a round: how many of the `drafted` tokens each sequence accepted."""
        if not self.auto or drafted == 0:
            return
        tested = sum(min(count + 1, drafted) for count in accepted)  # those behind the first refused one were not
        share = 1 / max(1, len(accepted))
        self._accepted = _MEMORY * self._accepted + share * sum(accepted)
        self._tested = _MEMORY * self._tested + share * tested
        self._length = max((length for length in _LENGTHS if length <= self.longest), key=self._tokens_for_cost)

    def _tokens_for_cost(self, length: int) -> float:
        rate = min(self._accepted / self._tested, 0.999)
        return (1 - rate ** (length + 1)) / (1 - rate) / (1 + _DRAFT_STEP * length)


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
