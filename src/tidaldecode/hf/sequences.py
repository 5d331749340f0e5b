"""How long the sequences of a cache are, and which of their tokens are padding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tidaldecode.errors import InputError

PREFILL_CHUNK = 1024
"""Most tokens of a prompt that go through the model at once: activations stop growing with the prompt."""


@dataclass(eq=False)
class Sequences:
    """How long the sequences of a batch are, shared by all layers of a cache.

    Left padding is not stored, so that token 0 of every sequence lies in row 0: `lengths` differ where prompts do.

    Attributes:
        capacity: tokens that fit each sequence, left padding counted; rows of its block.
        lengths: [B], int32; tokens in the cache, those of the running forward pass included.
        new_lengths: [B], int32; tokens of the running forward pass, without padding.
        block_table: [B, 1], int32; the contiguous cache is one block per sequence.
        padded_length: tokens with left padding, the same for all sequences.
        moves: how often any of these tensors, or the K and V of a layer, came to lie elsewhere: a captured pass reads
            them where they were when it was captured.
    """

    capacity: int = 0
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    new_lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    block_table: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.int32))
    padded_length: int = 0
    moves: int = 0

    def check(self, batch: int, new_tokens: int) -> None:
        """Refuses a forward pass over [batch, new_tokens] tokens that the sequences can't go on with.

        Raises:
            InputError: no tokens, or another number of sequences than the cache holds.
        """
        if batch == 0 or new_tokens == 0:
            raise InputError(f"the input has no tokens, its shape is [{batch}, {new_tokens}]: give at least one")
        if self.padded_length > 0 and batch != len(self.lengths):
            raise InputError(f"the cache holds {len(self.lengths)} sequences, the input has {batch}: make a new one")

    def check_mask(self, attention_mask: Tensor, batch: int, new_tokens: int) -> None:
        """Refuses a mask by which attention would not be over the tokens in the cache and the new ones. Waits for it.

        Args:
            attention_mask: ones and zeros; [batch, tokens so far with the new ones], left-padded as the cache is.

        Raises:
            InputError: it is not.
        """
        width = self.padded_length + new_tokens
        if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (batch, width):
            given = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise InputError(f"attention_mask must be [{batch}, {width}], one entry a token, not {given}")
        mask = attention_mask.bool()
        count = mask.sum(1)
        lengths = count.clamp(max=new_tokens)
        if self.padded_length > 0:
            past = self.lengths.to(mask.device)
            lengths = torch.where(past > 0, past + new_tokens, lengths)
        wanted = torch.arange(width, device=mask.device) >= (width - lengths)[:, None]
        if bool((mask == wanted).all() & (lengths > 0).all()):
            return
        if not bool(count.all()):
            raise InputError("attention_mask leaves a sequence without tokens: take it out of the batch")
        if not torch.equal(count, mask.flip(1).cumprod(1).sum(1)):
            raise InputError(
                "attention_mask must pad on the left only: set padding_side='left' on the tokenizer, "
                "or pass the mask of a prompt that holds the padding token itself"
            )
        raise InputError(
            "attention_mask must be the one that the cache was filled with, and ones for what is new: "
            "crop() or reset() the cache to forget tokens"
        )

    def begin(self, batch: int, new_tokens: int, device: torch.device, new_lengths: Tensor | None) -> None:
        """Starts a forward pass over `new_tokens` tokens for each sequence, left padding included; they were checked.

        Args:
            new_lengths: [B], integer; tokens of each sequence, without padding; `None` for all of them.
        """
        if self.padded_length == 0:
            self._start(batch, device)
        self.advance(new_tokens if new_lengths is None else new_lengths)
        self.padded_length += new_tokens

    def advance(self, new_lengths: Tensor | int) -> None:
        """Takes new tokens in on the device alone, so that it can be captured in a CUDA graph."""
        if isinstance(new_lengths, int):
            self.new_lengths.fill_(new_lengths)
        else:
            self.new_lengths.copy_(new_lengths)
        self.lengths.add_(self.new_lengths)

    def _start(self, batch: int, device: torch.device) -> None:
        """Makes all sequences empty; the tensors stay where the batch is as large, so that graphs stay valid."""
        if len(self.lengths) == batch and self.lengths.device == device:
            self.lengths.zero_()
        else:
            self._place(torch.zeros(batch, dtype=torch.int32, device=device))

    def _place(self, lengths: Tensor) -> None:
        with torch.inference_mode(False):  # written in place by later passes, in whatever mode
            self.lengths = lengths.clone()
            self.new_lengths = torch.zeros_like(self.lengths)
            self.block_table = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)[:, None]
        self.moves += 1

    def take(self, rows: Tensor) -> None:
        """Keeps these sequences alone, in this order, some perhaps several times; `rows` is [N], int64."""
        self._place(self.lengths[rows.to(self.lengths.device)])

    def rewind(self, padded_length: int, lengths: Tensor) -> None:
        """Lets every sequence end at its own length, in place, so that graphs stay valid."""
        self.lengths.copy_(lengths)
        self.padded_length = padded_length
