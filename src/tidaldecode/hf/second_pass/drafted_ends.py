"""Ends of sequence in a round of lossless decoding, before the tokens are handed out."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor


class DraftedEnds:
    """Lets what comes behind an end of sequence be padding, as it is in Transformers' own loop.

    Nobody sees those tokens but the logits processors: they must not find there what Transformers would never show
    them. And where all sequences end it would ask them no more: a rule of allowed tokens may know none behind an end.

    Args:
        ends: [E], int64; the tokens that end a sequence; `None` if none does.
        padding: [], int64; `None` if there is none.
        processors: what is asked at each position.
        batch: sequences.
        device: of their tokens.

    Attributes:
        everywhere: every sequence has ended, some in drafted tokens, and a processor may mind being asked; looked at on
            the host only if one may.
    """

    def __init__(
        self,
        ends: Tensor | None,
        padding: Tensor | None,
        processors: LogitsProcessorList,
        batch: int,
        device: torch.device,
    ) -> None:
        self.everywhere = False
        self._matters = ends is not None and padding is not None and len(processors) > 0
        self._may_mind = self._matters and any(map(_is_a_users, processors))
        if ends is not None and padding is not None:
            self._ends, self._padding = ends.to(device), padding.to(device)
            self._ended = torch.zeros(batch, dtype=torch.bool, device=device)

    def begin(self, closed: list[bool]) -> None:
        """Starts a round; `closed` says which sequences ended among the tokens that were handed out."""
        self.everywhere = False
        if self._matters:
            self._ended = self._ended | torch.tensor(closed, device=self._ended.device)
            self._drafted = self._ended

    def drafted(self, token: Tensor) -> Tensor:
        """What takes the place of drafted tokens [B]: themselves, or padding."""
        if not self._matters:
            return token
        token = torch.where(self._drafted, self._padding, token)
        self._drafted = self._drafted | torch.isin(token, self._ends)
        self.everywhere = self._may_mind and bool(self._drafted.all())
        return token

    def accepted(self, drafted: Tensor, accepted: Tensor, behind: Tensor) -> Tensor:
        """Remembers the ends that are accepted, and gives what takes the place of the tokens behind them.

        Args:
            drafted: [B, N], int64.
            accepted: [B], int64; how many of them are accepted.
            behind: [B], int64; full attention's token behind those.

        Returns:
            [B], int64.
        """
        if not self._matters:
            return behind
        kept = torch.arange(drafted.shape[1], device=drafted.device) < accepted[:, None]
        self._ended = self._ended | (torch.isin(drafted, self._ends) & kept).any(1)
        behind = torch.where(self._ended, self._padding, behind)
        self._ended = self._ended | torch.isin(behind, self._ends)
        return behind


def _is_a_users(processor: object) -> bool:
    """Whether a processor is a user's own, or asks a user's function."""
    return isinstance(processor, PrefixConstrainedLogitsProcessor) or not type(processor).__module__.startswith(
        "transformers."
    )
