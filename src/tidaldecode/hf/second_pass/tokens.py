"""Tokens of a batch whose sequences grow by different numbers, and how they are handed out as if side by side."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class TokenBuffer:
    """Prompts and new tokens of a batch, each sequence as far as it has come, with room for drafted tokens behind.

    Behind an end of sequence only padding is written, as in Transformers' own loop. Nobody sees that but the logits
    processors: they must not find there what Transformers would never show them.

    Args:
        prompt: [B, W], int64; left-padded.
        room: most tokens that can be written behind the prompt.
        padding: [], int64; what logits processors find behind a sequence that is shorter than others; 0 if left out.
        eos: [E], int64; the tokens that end a sequence; `None` if none does, or nobody looks.

    Attributes:
        ids: [B, W + room], int64; of sequence `b` the first `counts[b]` are valid.
        counts: tokens of each sequence, prompt and padding included.
        ends: `counts` on the device, [B], int64.
        closed: for each sequence, whether it goes on no more.
    """

    def __init__(self, prompt: Tensor, room: int, padding: Tensor | None = None, eos: Tensor | None = None) -> None:
        self._padding = prompt.new_zeros(()) if padding is None else padding.to(prompt.device)
        self._eos = None if padding is None or eos is None else eos.to(prompt.device)
        self._width = prompt.shape[1]
        self.ids = torch.nn.functional.pad(prompt, (0, room))
        self.cut([self._width] * len(prompt))
        self.closed, self._closed = [False] * len(prompt), torch.zeros_like(self.ends, dtype=torch.bool)

    def cut(self, counts: list[int]) -> None:
        """Lets each sequence end after so many tokens."""
        self.counts = counts
        self.ends = torch.tensor(counts, device=self.ids.device)

    def close(self, closed: list[bool], width: int) -> None:
        """Says which sequences go on no more: those that did before end after `width` tokens."""
        if closed == self.closed:
            return
        ends = zip(self.counts, closed, self.closed, strict=True)
        self.cut([width if end and not before else count for count, end, before in ends])
        self.closed, self._closed = closed, torch.tensor(closed, device=self.ids.device)

    def extend(self, new: list[int]) -> None:
        """Lets the sequences take in so many of the tokens that were written behind their ends."""
        self.cut([count + more for count, more in zip(self.counts, new, strict=True)])

    def write(self, offset: int | Tensor, tokens: Tensor) -> None:
        """Writes a token [B] for each sequence, `offset` tokens (one number, or [B]) behind its end."""
        if self._eos is not None:
            tokens = torch.where(self._ended(offset), self._padding, tokens)
        self.ids.scatter_(1, (self.ends + offset)[:, None], tokens[:, None])

    def _ended(self, offset: int | Tensor) -> Tensor:
        """Whether each sequence has ended in front of the token `offset` tokens behind its end, [B]."""
        assert self._eos is not None
        columns = torch.arange(self._width, self.ids.shape[1], device=self.ids.device)
        ended = torch.isin(self.ids[:, self._width :], self._eos) & (columns < (self.ends + offset)[:, None])
        return ended.any(1) | self._closed

    def all_ended(self, offset: int) -> bool:
        """Whether every sequence has, and is looked at for that: the host waits for it."""
        return self._eos is not None and bool(self._ended(offset).all())

    def window(self, first: int, tokens: int) -> Tensor:
        """`tokens` tokens of each sequence, from `first` tokens behind its end on (-1 for its last): [B, tokens]."""
        columns = self.ends[:, None] + torch.arange(first, first + tokens, device=self.ids.device)
        return self.ids.gather(1, columns)

    def scores(self, processors: LogitsProcessorList, offset: int, logits: Tensor) -> Tensor:
        """What Transformers' logits processors make of logits, as when all sequences grow together.

        They see the batch at one width after another, for they may go by it: a sequence's scores are those at its own.

        Args:
            offset: tokens that were written behind each sequence's end, and are part of it here.
            logits: [B, V].

        Returns:
            [B, V], float32.
        """
        logits = logits.to(self.ids.device, torch.float32, copy=True)
        if not processors:
            return logits
        if len(set(self.counts)) == 1:  # nothing to pick apart
            return processors(self.ids[:, : self.counts[0] + offset], logits)
        scores = logits
        for width in sorted(set(self.counts)):  # told apart on the device: indices would have to be copied there
            there = torch.arange(width + offset, device=self.ids.device) < (self.ends + offset)[:, None]
            seen = torch.where(there, self.ids[:, : width + offset], self._padding)
            own = processors(seen, logits.clone())
            scores = torch.where((self.ends == width)[:, None], own, scores)
        return scores


class Output:
    """Tokens of a batch, handed out in the order of Transformers' own loop: one of each sequence at a time.

    They go to the stopping criteria and to the streamer. A sequence that ended with an end-of-sequence token gets
    padding, as there; it is closed, and no more is generated for it.

    Args:
        tokens: the sequences; a closed one is cut where it ended.
        stopping_criteria: Transformers' own and the user's.
        streamer: gets the tokens, or `None`.
        padding: [], int64; the padding token; `None` if there is none.

    Attributes:
        width: tokens of each sequence that were handed out, prompt and padding included.
        done: whether all sequences are finished.
    """

    def __init__(
        self,
        tokens: TokenBuffer,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        padding: Tensor | None,
    ) -> None:
        self.width = min(tokens.counts)
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
        tokens = self._tokens
        while not self.done and all(
            closed or count > self.width for count, closed in zip(tokens.counts, tokens.closed, strict=True)
        ):
            self._hand_out_one()

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
            self._tokens.close([not flag for flag in unfinished], self.width)
