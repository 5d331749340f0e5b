"""The attention at work on a cache: its decode steps and chunks, captured on a GPU, its corrections and rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode import ops
from tidaldecode.errors import InputError
from tidaldecode.hf.captured import CapturedPass, capture, say_once
from tidaldecode.hf.layers import TidalLayer, WindowLayer
from tidaldecode.hf.sequences import Sequences
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.verified import VerifiedDrafts

Kind = Literal["full", "step", "steps"]
"""What the tokens of a forward pass attend to: all before them, as one decode step, as a decode step each."""

STEP = 0
"""The decode step's place among the captured passes; that of a chunk is its number of tokens."""


class Session:
    """An attention at work on the sequences and layers of a cache.

    Args:
        sequences: lengths of the sequences.
        layers: their K and V.
        attention: what attends in a decode step: a plan at work, or what it is compared with.

    Attributes:
        graphs: the captured passes: the decode step's at `STEP`, a chunk's with full attention at its tokens.
        refused: those that could not be captured.
        prepared: the attention looked at the K of the prompt.
    """

    def __init__(self, sequences: Sequences, layers: Sequence[TidalLayer | WindowLayer], attention: Attention) -> None:
        self.sequences, self.layers = sequences, layers
        self.graphs: dict[int, CapturedPass] = {}
        self.refused: set[int] = set()
        self._attended = 0
        self._kind: Kind = "full"
        self._step_lengths = sequences.lengths  # [N], int32; of the sequence in each of N decode steps
        self.use(attention)

    @property
    def step(self) -> CapturedPass | None:
        """The captured decode step, if there is one."""
        return self.graphs.get(STEP)

    def use(self, attention: Attention) -> None:
        """Lets the steps that follow go by another attention; a chunk's full attention is the same as before."""
        self.attention = attention
        self.prepared = False
        self.graphs.pop(STEP, None)
        self.refused.discard(STEP)

    def moved(self) -> None:
        """What captured passes read, and what the attention looked at, lies elsewhere or is other sequences'."""
        self.graphs.clear()
        self.prepared = False

    def prepare(self) -> None:
        """Lets the attention look at the K of a prompt, once, before the first step behind it."""
        if self.prepared:
            return
        for index, layer in enumerate(self.layers):
            if isinstance(layer, TidalLayer):
                self.attention.prepare(index, layer.kv())
        self.prepared = True

    def begin(self, kind: Kind, tokens: int) -> None:
        """Starts a forward pass over `tokens` tokens of each sequence, which the sequences have taken in."""
        sequences = self.sequences
        lengths = sequences.lengths
        self._kind, self._attended = kind, 0
        if kind == "step":
            self.prepare()
        else:
            self.prepared = False
        if kind == "full":
            if isinstance(self.attention, VerifiedDrafts):
                self.attention.begin_pass(lengths, sequences.new_lengths, sequences.capacity)
            return
        if kind == "steps":
            self.graphs.pop(STEP, None)  # the attention allocates for as many sequences as there are steps
            lengths = lengths + torch.arange(1 - tokens, 1, dtype=torch.int32, device=lengths.device)
            self._step_lengths = lengths
        self.attention.begin(lengths, sequences.capacity)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of a layer over its cache, which holds the K and V of all tokens of the pass already.

        Args:
            layer: index of the layer.
            query: [B, N, Hq, D], the new tokens, left-padded.
            scale: factor of the scores.

        Returns:
            [B, N, Hq, D].
        """
        self._attended += 1
        kv = self.layers[layer].kv()
        if self._kind == "step":
            return self.attention.attend(layer, query[:, 0], kv, scale)[:, None]
        if self._kind == "steps" and not self.attention.is_full(layer):
            # each is a sequence of its own to the operations, and all share the one block
            self.attention.prepare(layer, kv)
            steps = replace(kv, block_table=kv.block_table.expand(len(query[0]), 1), lengths=self._step_lengths)
            return self.attention.attend(layer, query[0], steps, scale)[None]
        if isinstance(self.attention, VerifiedDrafts):
            return self.attention.verify(layer, query, kv, self.sequences.new_lengths, scale)
        return ops.multi_query_attention(query, kv, self.sequences.new_lengths, scale)

    def write_and_attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`decode_attention` of a pass that is traced: writes the tokens' K and V, and attends."""
        self.layers[layer].write(key, value)
        return self.attend(layer, query.transpose(1, 2), scale)

    def attended_everywhere(self) -> bool:
        """Whether every layer with a role attended in the latest forward pass."""
        return self._attended == sum(isinstance(layer, TidalLayer) for layer in self.layers)

    # ---- captured passes

    def captured(
        self, model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor, kind: Kind
    ) -> CapturedPass | None:
        """The pass of a model over new tokens, captured when it is first asked for; `None` where that is impossible.

        The reason is logged, once a model.

        Args:
            token_ids, position_ids: what will be replayed with, [B, N]; N is 1 for a decode step.
            kind: "step", or "full" for a chunk.
        """
        tokens = token_ids.shape[1]
        if kind == "step":
            key, what = STEP, "the decode step"
            self.prepare()
        else:
            key, what = tokens, f"the pass over {tokens} tokens with full attention"
        graph = self.graphs.get(key)  # `None` in a copy of a cache
        if graph is not None and graph.serves(model, self.sequences):
            return graph
        self.graphs.pop(key, None)
        reason = self._obstacle(model, key)
        if reason is None and key not in self.refused:

            def begin() -> None:
                self.sequences.advance(tokens)
                self.begin(kind, tokens)

            graph, reason = capture(model, self.sequences, begin, self.write_and_attend, token_ids, position_ids, what)
            if graph is not None:
                self.graphs[key] = graph
                return graph
            self.refused.add(key)
        if reason is not None:
            say_once(model, what, reason)
        return None

    def _obstacle(self, model: PreTrainedModel, tokens: int) -> str | None:
        """Why a pass can't be captured, if that is known beforehand."""
        if not all(isinstance(layer, TidalLayer) for layer in self.layers):
            return "some layers keep a sliding window, whose cache counts on the host"
        if model.training:
            return "the model is in training mode: call model.eval()"
        if not ops.has_kernel(self.layers[0].keys):
            return "its attention has no kernels"
        if tokens > ops.MOST_CHUNK_TOKENS:
            return f"there is no kernel for chunks of more than {ops.MOST_CHUNK_TOKENS} tokens"
        return None


class Correction:
    """When the decoded tokens of a cache run again with full attention, and which ones have not yet.

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

    def add(self, token_ids: Tensor, positions: Tensor) -> None:
        """A decode step: its token, [B, 1], and its positions, [B, 1] or [1, 1]; int64."""
        self._steps.append((token_ids.clone(), positions.expand_as(token_ids).clone()))

    def take_out(self) -> tuple[Tensor, Tensor]:
        """Ids and positions of the tokens that run again now, [B, N] each, int64."""
        ids, positions = (torch.cat(parts, 1) for parts in zip(*self._steps, strict=True))
        self._steps.clear()
        return ids, positions

    def take(self, rows: Tensor) -> None:
        """The cache keeps these sequences alone, in this order; `rows` is [N], int64."""
        self._steps = [(ids[rows.to(ids.device)], where[rows.to(where.device)]) for ids, where in self._steps]

    def forget(self, tokens: int | None = None) -> None:
        """The last `tokens` decoded tokens left the cache, or all of them."""
        del self._steps[0 if tokens is None else max(0, len(self) - tokens) :]
