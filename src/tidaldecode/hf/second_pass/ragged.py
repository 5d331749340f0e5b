"""Token ids of sequences that grow by different numbers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList


class RaggedTokens:
    """Prompts and new tokens of a batch, each sequence as far as it has come, with room for drafted tokens behind.

    Args:
        prompt: [B, W], int64; left-padded.
        room: most tokens that can be written behind the prompt.
        padding: [], int64; what logits processors find behind a sequence that is shorter than others; 0 if left out.

    Attributes:
        ids: [B, W + room], int64; of sequence `b` the first `counts[b]` are valid.
        counts: tokens of each sequence, prompt and padding included.
    """

    def __init__(self, prompt: Tensor, room: int, padding: Tensor | None = None) -> None:
        self._padding = prompt.new_zeros(()) if padding is None else padding.to(prompt.device)
        self.ids = torch.nn.functional.pad(prompt, (0, room))
        self.counts = [prompt.shape[1]] * len(prompt)
        self._ends = self._on_device()

    def _on_device(self) -> Tensor:
        return torch.tensor(self.counts, device=self.ids.device)

    @property
    def ends(self) -> Tensor:
        """`counts` on the device, [B], int64."""
        return self._ends

    def write(self, offset: int | Tensor, tokens: Tensor) -> None:
        """Writes a token [B] for each sequence, `offset` tokens (one number, or [B]) behind its end."""
        self.ids.scatter_(1, (self._ends + offset)[:, None], tokens[:, None])

    def extend(self, new: list[int]) -> None:
        """Lets the sequences take in so many of the tokens that were written behind their ends."""
        self.counts = [count + more for count, more in zip(self.counts, new, strict=True)]
        self._ends = self._on_device()

    def cut(self, counts: list[int]) -> None:
        """Lets each sequence end after so many tokens."""
        self.counts = counts
        self._ends = self._on_device()

    def window(self, first: int, tokens: int) -> Tensor:
        """`tokens` tokens of each sequence, from `first` tokens behind its end on (-1 for its last): [B, tokens]."""
        columns = self._ends[:, None] + torch.arange(first, first + tokens, device=self.ids.device)
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
            there = torch.arange(width + offset, device=self.ids.device) < (self._ends + offset)[:, None]
            seen = torch.where(there, self.ids[:, : width + offset], self._padding)
            own = processors(seen, logits.clone())
            scores = torch.where((self._ends == width)[:, None], own, scores)
        return scores
