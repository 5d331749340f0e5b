"""Cache correction: decoded tokens run again with full attention (TidalDecode, arXiv 2410.05076).

Hidden states of sparsely decoded tokens drift from full attention's, and so do their K and V. Every `interval` decoded
tokens, those tokens run again as one chunk with full attention in all layers, and their rows of the cache are written
anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tidaldecode.errors import InputError
from tidaldecode.hf.cache import TidalCache
from tidaldecode.hf.second_pass.full_pass import full_pass
from tidaldecode.models.architecture import rope_varies, sliding_windows


class Correction:
    """When decoded tokens run again, and which ones have not yet.

    Args:
        interval: decoded tokens between two corrections.

    Raises:
        InputError: the interval is no positive whole number.
    """

    def __init__(self, interval: int) -> None:
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise InputError(f"correction_interval {interval!r} must be a positive whole number of tokens")
        self.interval = interval
        self._steps: list[tuple[Tensor, Tensor]] = []  # ids and positions, [B, 1] each

    def __len__(self) -> int:
        """Tokens of each sequence that were decoded since the latest correction."""
        return len(self._steps)

    def decoded(self, model: PreTrainedModel, cache: TidalCache, token_ids: Tensor | None, positions: Tensor) -> None:
        """Counts a decode step, and corrects if it is time.

        Args:
            token_ids: [B, 1], int64; the token that was decoded into the cache.
            positions: [B, 1] or [1, 1], int64; its positions.

        Raises:
            InputError: there are no token ids.
        """
        if token_ids is None:
            raise InputError("cache correction needs input_ids: embeddings alone can't be decoded with it")
        self._steps.append((token_ids.clone(), positions.expand_as(token_ids).clone()))
        if len(self._steps) >= self.interval:
            self.correct(model, cache)

    def correct(self, model: PreTrainedModel, cache: TidalCache) -> None:
        """Runs the tokens that were decoded since the latest correction again, if there are any.

        A pass that is stopped leaves the cache whole: some layers hold corrected K and V, the others those of decoding.
        """
        if not self._steps:
            return
        ids, positions = (torch.cat(parts, 1) for parts in zip(*self._steps, strict=True))
        self._steps.clear()
        tokens, sequences = ids.shape[1], cache.sequences
        with cache.kept_if_stopped():
            cache.rewind(sequences.padded_length - tokens, sequences.lengths - tokens)
            full_pass(model, cache, ids, positions, last_logits=True, capture=tokens == self.interval)

    def take(self, rows: Tensor) -> None:
        """The cache keeps these sequences alone, in this order; `rows` is [N], int64."""
        self._steps = [(ids[rows.to(ids.device)], where[rows.to(where.device)]) for ids, where in self._steps]

    def forget(self, tokens: int | None = None) -> None:
        """The last `tokens` decoded tokens left the cache, or all of them."""
        del self._steps[0 if tokens is None else max(0, len(self) - tokens) :]


def check_second_pass(config: PreTrainedConfig, option: str) -> None:
    """Refuses a model whose tokens can't run a second time.

    Args:
        option: what asked for it, for the message.

    Raises:
        InputError: some layers keep a sliding window, or RoPE's frequencies go by the length of the pass.
    """
    if any(window is not None for window in sliding_windows(config)):
        raise InputError(f"{config.model_type!r} has sliding-window layers, which can't forget: leave out {option}")
    if rope_varies(config):
        raise InputError(f"{config.model_type!r} has RoPE frequencies that vary with the context: leave out {option}")
