"""Logits processors beside drafted tokens: what they must not keep, and what they must not see."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from tidaldecode.errors import InputError

_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


def check_processors(processors: LogitsProcessorList, prompt: Tensor, vocabulary: int) -> None:
    """Refuses logits processors whose scores depend on more than their arguments: drafts may be taken back.

    Transformers' own are known. One of somebody else's is called once with the prompt and zeros: if an attribute of it
    changes, it keeps state.

    Args:
        prompt: [B, W], int64.
        vocabulary: entries of the logits.

    Raises:
        InputError: a processor keeps state between calls, or holds what can't be copied and compared.
    """
    for processor in processors:
        if isinstance(processor, _STATEFUL) or (
            not _is_transformers(processor) and _changes(processor, prompt, vocabulary)
        ):
            raise InputError(
                f"the logits processor {type(processor).__name__} keeps state between calls, which can't be taken back "
                "with refused tokens: leave out lossless, or the processor"
            )


def _is_transformers(processor: object) -> bool:
    return type(processor).__module__.startswith("transformers.")


def _changes(processor: Any, prompt: Tensor, vocabulary: int) -> bool:
    try:
        before = copy.deepcopy(getattr(processor, "__dict__", {}))
        _same(before, before)
    except Exception as error:  # whatever the attributes' own methods raise: locks, arrays, cycles
        raise InputError(
            f"the logits processor {type(processor).__name__} can't be looked at for state between calls "
            f"({type(error).__name__}): leave out lossless, or the processor"
        ) from None
    processor(prompt.clone(), torch.zeros(len(prompt), vocabulary, device=prompt.device))
    return not _same(before, getattr(processor, "__dict__", {}))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if hasattr(one, "__dict__"):  # a deep copy may not be equal to what it is a copy of: look inside
        return type(one) is type(other) and _same(vars(one), vars(other))
    return bool(one == other) or (one != one and other != other)  # NaN is the same as NaN


class PaddingBehindEnds:
    """Lets what is drafted behind an end of sequence be padding, as it is in Transformers' own loop.

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
        self._may_mind = self._matters and any(  # a user's own, or one that asks a user's function
            isinstance(processor, PrefixConstrainedLogitsProcessor) or not _is_transformers(processor)
            for processor in processors
        )
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
