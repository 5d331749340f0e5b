"""The KV cache of a model with a plan: written in place, read by token, and it grows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from tidaldecode import ops
from tidaldecode.errors import InputError
from tidaldecode.hf.layers import TidalLayer, WindowLayer
from tidaldecode.hf.sequences import Sequences
from tidaldecode.methods.tidal import Attention, DecodeAttention
from tidaldecode.methods.verified import VerifiedDrafts
from tidaldecode.models.architecture import check_plan, model_shape, sliding_windows
from tidaldecode.ops import KV
from tidaldecode.plans.find import PlanLike, find_plan

if TYPE_CHECKING:
    from tidaldecode.hf.captured import CapturedStep
    from tidaldecode.hf.second_pass.correction import Correction
    from tidaldecode.hf.second_pass.drafting import Rounds


@dataclass(frozen=True)
class Mark:
    """Where a cache stood: its tokens, left padding counted, and copies of the layers that keep a window alone."""

    padded_length: int
    lengths: Tensor
    windows: dict[int, WindowLayer]


class TidalCache(Cache):
    """The cache that a model with a plan decodes with; `generate` makes one, a loop of your own passes it.

    Args:
        config: the model's configuration.
        plan: the plan that was applied to the model, in any form that `tidaldecode.apply` takes.
        capacity: tokens to allocate for each sequence, prompt and new tokens together. The cache grows where more come,
            which moves it and has the decode step captured anew.

    Raises:
        InputError: there is no such plan, it does not fit the model, or the capacity is no positive whole number.

    Attributes:
        attention: the plan at work, with the index sets of the latest step.
        sequences: lengths of the sequences.
        correction: when decoded tokens run again with full attention; `None` for never.
        rounds: what the rounds of the latest lossless generation drafted and accepted; `None` before the first.
    """

    def __init__(self, config: PreTrainedConfig, plan: PlanLike, capacity: int) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise InputError(f"capacity {capacity!r} must be a positive whole number of tokens")
        self.config = config
        self.sequences = Sequences(capacity)
        self.correction: Correction | None = None
        self.rounds: Rounds | None = None
        self.chunks: dict[int, CapturedStep] = {}  # captured passes over so many tokens with full attention
        self.chunks_refused: set[int] = set()
        self._one_mask = self._mask_seen = False
        self.use_plan(plan)
        windows = sliding_windows(config)
        num_global = windows.count(None)
        super().__init__(
            layers=[
                TidalLayer(self.sequences, num_global, first=layer == windows.index(None))
                if window is None
                else WindowLayer(window)
                for layer, window in enumerate(windows)
            ]
        )

    @property
    def capacity(self) -> int:
        """Tokens of each sequence that are allocated, left padding counted."""
        return self.sequences.capacity

    @property
    def attention(self) -> Attention:
        """What attends in a decode step: a plan at work, or what it is compared with."""
        return self._attention

    @attention.setter
    def attention(self, attention: Attention) -> None:
        self._attention = attention
        self._prepared = False
        self.step: CapturedStep | None = None  # it was captured with the attention before
        self.step_refused = False
        self._drafts: TidalCache | None = None

    def for_drafts(self, longest: int) -> TidalCache:
        """The cache as rounds of lossless decoding see it, which draft at most `longest` tokens.

        This one, or, if the plan drafts out of verification, one over the same sequences and rows with an attention and
        captured passes of its own.
        """
        plan = self.attention.plan if isinstance(self.attention, DecodeAttention) else None
        if plan is None or plan.drafting == "plan":
            return self
        before = None if self._drafts is None else self._drafts.attention
        if self._drafts is None or not isinstance(before, VerifiedDrafts) or before.longest < longest:
            self._drafts = copy.copy(self)
            self._drafts.attention = VerifiedDrafts(plan, model_shape(self.config), longest)
            self._drafts.chunks, self._drafts.chunks_refused = {}, set()
        return self._drafts

    def prepare(self) -> None:
        """Lets the attention look at the K of a prompt, once, before the first step behind it."""
        if self._prepared:
            return
        for index, layer in enumerate(self.layers):
            if isinstance(layer, TidalLayer):
                self.attention.prepare(index, layer.kv())
        self._prepared = True

    def check_pass(self, batch: int, new_tokens: int, attention_mask: Tensor | None) -> None:
        """Refuses a forward pass that the cache can't follow, before anything is written.

        Args:
            attention_mask: [batch, tokens so far with the new ones], ones and zeros; `None` if no new token is padding.

        Raises:
            InputError: no tokens, another number of sequences, a mask that is not left-padded as the cache is, or a
                cache that was left in the middle of a forward pass.
        """
        self.sequences.check(batch, new_tokens)
        self._check_whole()
        if attention_mask is None or self._mask_seen:
            return
        self.sequences.check_mask(attention_mask, batch, new_tokens)
        self._mask_seen = self._one_mask

    @contextmanager
    def one_mask(self) -> Iterator[None]:
        """While it lasts the mask of the first pass alone is looked at, for that waits for the GPU.

        For Transformers' own loop, which lets ones follow that mask.
        """
        self._one_mask, self._mask_seen = True, False
        try:
            yield
        finally:
            self._one_mask = self._mask_seen = False

    def begin(self, batch: int, new_tokens: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Starts a forward pass over [batch, new_tokens] tokens, after `check_pass`.

        Args:
            attention_mask: [batch, tokens so far with these], ones and zeros, left-padded; `None` for no padding.

        Raises:
            InputError: memory is too short for the tokens.
        """
        self.ready(batch, new_tokens)
        lengths = self.sequences.lengths
        self.sequences.begin(batch, new_tokens, attention_mask, device)
        if self.sequences.lengths is not lengths:
            self._forget_steps()
        self._attended = 0
        self._prepared = self._prepared and self.sequences.decoding
        if self.sequences.decoding:
            self.prepare()
            self.attention.begin(self.sequences.lengths, self.capacity)

    def _forget_steps(self) -> None:
        """Captured steps read what does not lie there any more."""
        self.step = self._drafts = None
        self.chunks.clear()

    def begin_chunk(self, new_tokens: int, new_lengths: Tensor | None = None) -> None:
        """Starts a forward pass over a chunk behind a prompt, in which each token attends to all before it.

        Args:
            new_tokens: tokens of the chunk, left padding included.
            new_lengths: [batch], integer; tokens of each sequence, without padding; `None` for all of them.

        Raises:
            InputError: no tokens, or memory is too short for them.
        """
        self.ready(len(self.sequences.lengths), new_tokens)
        self.sequences.begin_chunk(new_tokens, new_lengths)
        self._begin_verification()
        self._attended, self._prepared = 0, False

    def begin_steps(self, steps: int, device: torch.device) -> None:
        """Starts a forward pass over `steps` tokens of one sequence in which each attends as in a decode step.

        Raises:
            InputError: memory is too short for the tokens, or the cache holds several sequences.
        """
        self.ready(1, steps)
        lengths = self.sequences.begin_steps(steps, device)
        self._attended, self._prepared = 0, False
        self.step = None  # the attention allocates for as many sequences as there are steps
        self.attention.begin(lengths, self.capacity)

    def ready(self, batch: int, new_tokens: int) -> None:
        """Makes the cache ready for a pass over so many tokens of each of `batch` sequences, captured or not.

        Raises:
            InputError: no tokens, another number of sequences than the cache holds, a cache that was left in the middle
                of a forward pass, or memory is too short.
        """
        self.sequences.check(batch, new_tokens)
        self._check_whole()
        self.make_room(new_tokens)

    def make_room(self, new_tokens: int) -> None:
        """Lets the cache grow where so many more tokens of each sequence do not fit.

        By half at least, if memory allows: however many tokens come one by one, each is moved a few times only.

        Raises:
            InputError: memory is too short; the cache stays as it was.
        """
        needed = self.sequences.padded_length + new_tokens
        if needed <= self.capacity:
            return
        capacity = self._affordable(needed, self.capacity + self.capacity // 2)
        self._prepared, self.step = False, None  # captured passes read what lies elsewhere now
        self.chunks.clear()
        for layer in self.layers:
            layer.grow(capacity)
        self.sequences.capacity = capacity

    def _affordable(self, needed: int, wanted: int) -> int:
        """The capacity to grow to: `wanted`, or what is `needed` if that is more or memory is short."""
        layer = next(layer for layer in self.layers if isinstance(layer, TidalLayer))
        if wanted > needed:
            with suppress(InputError):
                layer.check_growth(wanted)
                return wanted
        layer.check_growth(needed)
        return needed

    def _check_whole(self) -> None:
        lengths = {layer.padded_length for layer in self.layers if isinstance(layer, TidalLayer)}
        if lengths - {self.sequences.padded_length}:
            raise InputError("the cache was left in the middle of a forward pass: reset() it or make a new one")

    def count(self, tokens: int) -> None:
        """Counts, on the host, the tokens per sequence that a captured pass adds on the device."""
        self.sequences.padded_length += tokens
        for layer in self.layers:
            layer.padded_length += tokens

    def advance(self) -> None:
        """Starts a decode step on the device alone, so that it can be captured in a CUDA graph."""
        sequences = self.sequences
        sequences.new_lengths.fill_(1)
        sequences.lengths.add_(1)
        self.attention.begin(sequences.lengths, self.capacity)

    def advance_chunk(self, new_tokens: int) -> None:
        """Starts a pass over a chunk on the device alone, so that it can be captured in a CUDA graph."""
        self.sequences.new_lengths.fill_(new_tokens)
        self.sequences.lengths.add_(new_tokens)
        self._begin_verification()

    def _begin_verification(self) -> None:
        if isinstance(self.attention, VerifiedDrafts):
            self.attention.begin_pass(self.sequences.lengths, self.sequences.new_lengths, self.capacity)

    def decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Writes a new token's K and V in one layer and attends, after `advance`.

        Args:
            layer: index of the layer.
            query: [B, Hq, 1, D].
            key, value: [B, Hkv, 1, D].
            scale: factor of the scores.

        Returns:
            [B, 1, Hq, D].
        """
        kv = self._write(layer, key, value)
        return self.attention.attend(layer, query[:, :, 0], kv, scale)[:, None]

    def attend_chunk(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Writes the K and V of a chunk in one layer and attends to everything, after `advance_chunk`.

        Args:
            layer: index of the layer.
            query: [B, Hq, N, D].
            key, value: [B, Hkv, N, D].
            scale: factor of the scores.

        Returns:
            [B, N, Hq, D].
        """
        return self._attend_to_all(layer, query.transpose(1, 2), self._write(layer, key, value), scale)

    def _attend_to_all(self, layer: int, query: Tensor, kv: KV, scale: float) -> Tensor:
        """Full attention of several new tokens, [B, N, Hq, D]; chooses what drafts read where they go by that."""
        new_lengths = self.sequences.new_lengths
        if isinstance(self.attention, VerifiedDrafts):
            return self.attention.verify(layer, query, kv, new_lengths, scale)
        return ops.multi_query_attention(query, kv, new_lengths, scale)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> KV:
        """Writes new K and V, [B, Hkv, N, D], in one layer; returns its cache."""
        kv: KV = self.layers[layer].kv()
        ops.write_kv(key.transpose(1, 2), value.transpose(1, 2), kv, self.sequences.new_lengths)
        return kv

    def attended_everywhere(self) -> bool:
        """Whether every layer with a role attended through this cache in the latest forward pass."""
        return self._attended == sum(isinstance(layer, TidalLayer) for layer in self.layers)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of a layer with a role over its cache, after `update`.

        A pass that stands for decode steps holds the K and V of all of them already; each step sees those up to itself.

        Args:
            layer: index of the layer.
            query: [B, N, Hq, D], the new tokens, left-padded.
            key, value: what `update` returned.
            scale: factor of the scores.

        Returns:
            [B, N, Hq, D].

        Raises:
            InputError: the model changed K or V after they were cached.
        """
        cached = self.layers[layer]
        if key is not cached.keys or value is not cached.values:
            raise InputError("the model changes K or V on their way from the cache: it can't work with tidaldecode")
        self._attended += 1
        sequences = self.sequences
        kv: KV = cached.kv()
        if sequences.step_lengths is not None and not self.attention.is_full(layer):
            # each step is a sequence of its own to the operations, and all share the one block
            table = sequences.block_table.expand(len(sequences.step_lengths), 1)
            self.attention.prepare(layer, kv)
            steps = replace(kv, block_table=table, lengths=sequences.step_lengths)
            return self.attention.attend(layer, query[0], steps, scale)[None]
        if sequences.decoding:
            return self.attention.attend(layer, query[:, 0], kv, scale)[:, None]
        return self._attend_to_all(layer, query, kv, scale)

    def use_plan(self, plan: PlanLike) -> None:
        """Lets the steps that follow go by another plan: after `crop`, one prompt serves several.

        Raises:
            InputError: there is no such plan, or it does not fit the model.
        """
        plan = find_plan(plan, self.config)
        check_plan(plan, self.config)
        self.attention = DecodeAttention(plan, model_shape(self.config))

    def has_role(self, layer: int) -> bool:
        """Whether the layer attends by the plan; the others keep their sliding window."""
        return isinstance(self.layers[layer], TidalLayer)

    def fill(
        self, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        """Holds random K and V of `tokens` tokens instead of a prompt's: for benchmarks of the decode step."""
        self.reset()
        self.begin(batch, tokens, None, device)
        shape = model_shape(self.config)
        new = torch.empty(batch, shape.num_kv_heads, 0, shape.head_dim, device=device, dtype=dtype)
        for layer in self.layers:
            layer.prepare(new, new)
            for rows in (layer.keys, layer.values):
                rows[:, :, :tokens].normal_(generator=generator)
            layer.padded_length = tokens

    def mark(self) -> Mark:
        """Remembers where the cache stands, for `go_back`; the windows of sliding-window layers are copied."""
        windows = {
            index: copy.deepcopy(layer) for index, layer in enumerate(self.layers) if isinstance(layer, WindowLayer)
        }
        return Mark(self.sequences.padded_length, self.sequences.lengths.clone(), windows)

    def go_back(self, mark: Mark) -> None:
        """Forgets the tokens that came since `mark`, in every layer; a mark can be used again.

        Raises:
            InputError: the cache holds fewer tokens than it did, or other sequences.
        """
        if len(mark.lengths) != len(self.sequences.lengths):
            raise InputError("the cache holds other sequences than when it was marked: fill it again")
        missing = mark.padded_length - self.sequences.padded_length
        if missing > 0:
            raise InputError(f"the cache holds {missing} tokens fewer than when it was marked: fill it again")
        for index, layer in mark.windows.items():
            self.layers[index] = copy.deepcopy(layer)
        self.rewind(mark.padded_length, mark.lengths)
        if self.correction is not None:
            self.correction.forget(-missing)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens of every sequence (the number is negative, as in Transformers).

        Raises:
            InputError: the number is positive or larger than the cache, or a layer keeps only a sliding window, whose
                older tokens are gone.
        """
        if not -self.sequences.padded_length <= tokens_to_remove <= 0:
            raise InputError(
                f"crop({tokens_to_remove}) of a cache of {self.sequences.padded_length} tokens: give the tokens to "
                "remove as a negative number"
            )
        if not all(isinstance(layer, TidalLayer) for layer in self.layers):
            raise InputError("a cache with sliding-window layers can't be cropped")
        lengths = (self.sequences.lengths + tokens_to_remove).clamp(min=0)
        self.rewind(self.sequences.padded_length + tokens_to_remove, lengths)
        if self.correction is not None:
            self.correction.forget(-tokens_to_remove)

    def rewind(self, padded_length: int, lengths: Tensor) -> None:
        """Lets every sequence end at its own length; the rows behind are free. Also after a pass that was stopped.

        Args:
            padded_length: tokens with left padding, at least the longest length.
            lengths: [B], integer; all rows up to them must have been written.
        """
        self.sequences.rewind(padded_length, lengths)
        self._prepared = False
        for layer in self.layers:
            if isinstance(layer, TidalLayer):
                layer.padded_length = padded_length

    @contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """Gives every sequence the length that it has now, if what runs inside is stopped by an error or the user."""
        padded_length, lengths = self.sequences.padded_length, self.sequences.lengths.clone()
        try:
            yield
        except BaseException:
            self.rewind(padded_length, lengths)
            raise

    def reset(self) -> None:
        """Forgets all sequences; what is allocated stays."""
        self.sequences.reset()
        if self.correction is not None:
            self.correction.forget()
        for layer in self.layers:
            layer.reset()

    # ---- what Transformers' recipes ask of a cache

    @property
    def batch_size(self) -> int:
        """Sequences in the cache; -1 before the first."""
        return len(self.sequences.lengths) or -1

    @property
    def max_batch_size(self) -> int:
        """As `batch_size`, by the name of earlier versions."""
        return self.batch_size

    @property
    def max_cache_len(self) -> int:
        """As `capacity`, by the name of earlier versions."""
        return self.capacity

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Holds each sequence `repeats` times, one copy behind the other: one prompt, several continuations.

        Raises:
            InputError: the number is not positive.
        """
        self._take(torch.arange(len(self.sequences.lengths)).repeat_interleave(max(0, repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences alone, in this order.

        Args:
            indices: [N], integer, or [B], bool.

        Raises:
            InputError: there is none among them, or one that the cache does not hold.
        """
        try:
            rows = torch.arange(len(self.sequences.lengths))[torch.as_tensor(indices).cpu()]
        except IndexError:
            raise InputError(
                f"batch_select_indices: the cache holds sequences 0 to {len(self.sequences.lengths) - 1}"
            ) from None
        self._take(rows)

    def _take(self, rows: Tensor) -> None:
        if self.sequences.padded_length == 0:
            return
        if len(rows) == 0:
            raise InputError("no sequence would stay in the cache: reset() it, or keep at least one")
        self._check_whole()
        for layer in self.layers:
            layer.take(rows)
        self.sequences.take(rows)
        self._forget_steps()
        self._prepared = False
        if self.correction is not None:
            self.correction.take(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search is not supported."""
        raise InputError("a TidalCache can't follow beam search: use greedy decoding or sampling")
