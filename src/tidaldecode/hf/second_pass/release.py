"""Hands new tokens out in the order of Transformers' own loop: to the stopping criteria and to the streamer."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tidaldecode.hf.second_pass.ragged import RaggedTokens


class Release:
    """Tokens of a batch, handed out one of each sequence at a time.

    A sequence that ended with an end-of-sequence token gets padding, as from Transformers' own loop; it is `closed`,
    and no more is generated for it.

    Args:
        tokens: the sequences; a closed one is cut where it ended.
        stopping_criteria: Transformers' own and the user's.
        streamer: gets the tokens, or `None`.
        padding: [], int64; the padding token; `None` if there is none.

    Attributes:
        width: tokens of each sequence that were handed out, prompt and padding included.
        closed: for each sequence, whether it ended.
        done: whether all sequences are finished.
    """

    def __init__(
        self,
        tokens: RaggedTokens,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        padding: Tensor | None,
    ) -> None:
        self.width = min(tokens.counts)
        self.closed = [False] * len(tokens.counts)
        self.done = False
        self._tokens, self._criteria, self._streamer = tokens, stopping_criteria, streamer
        self._ids = tokens.ids.clone()  # for behind the end of a closed sequence drafts are written all the same
        has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._padding = None if padding is None or not has_end else padding.to(tokens.ids.device)
        self._unfinished = torch.ones(len(tokens.counts), dtype=torch.bool, device=tokens.ids.device)

    @property
    def sequences(self) -> Tensor:
        """What was handed out behind the prompts, with them: [B, width]."""
        return self._ids[:, : self.width]

    def hand_out(self) -> None:
        """Hands out what all open sequences have, until all are finished."""
        while not self.done and self.width < self._common_width():
            self._hand_out_one()

    def _common_width(self) -> int:
        pairs = zip(self._tokens.counts, self.closed, strict=True)
        return min((count for count, closed in pairs if not closed), default=self.width)

    def _hand_out_one(self) -> None:
        column = self._tokens.ids[:, self.width]
        if self._padding is not None:
            column = torch.where(self._unfinished, column, self._padding)
        self._ids[:, self.width] = column
        self.width += 1
        self._unfinished &= ~self._criteria(self.sequences, None)
        if self._streamer is not None:
            self._streamer.put(column.cpu())
        unfinished = self._unfinished.tolist()
        self.done = not any(unfinished)
        if self._padding is not None:
            self._close([not flag for flag in unfinished])

    def _close(self, finished: list[bool]) -> None:
        if finished == self.closed:
            return
        counts = [
            self.width if end and not closed else count
            for count, end, closed in zip(self._tokens.counts, finished, self.closed, strict=True)
        ]
        self.closed = finished
        self._tokens.cut(counts)
