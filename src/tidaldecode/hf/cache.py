"""The KV cache of a model with a plan: allocated once, written in place, read by token."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, StaticSlidingWindowLayer

from tidaldecode import ops
from tidaldecode.architecture import check_plan, model_shape, sliding_windows
from tidaldecode.attention import Attention, DecodeAttention
from tidaldecode.errors import InputError
from tidaldecode.plans.find import PlanLike, find_plan
from tidaldecode.verified import VerifiedDrafts

if TYPE_CHECKING:
    from tidaldecode.hf.captured import CapturedStep
    from tidaldecode.hf.correction import Correction
    from tidaldecode.hf.drafting import Rounds


@dataclass
class Sequences:
    """How long the sequences of a batch are, shared by all layers of a cache.

    Left padding is not stored, so that token 0 of every sequence lies in row 0: `lengths` differ where prompts do.

    Attributes:
        lengths: [B], int32; tokens in the cache, those of the running forward pass included.
        new_lengths: [B], int32; tokens of the running forward pass, without padding.
        block_table: [B, 1], int32; the contiguous cache is one block per sequence.
        padded_length: tokens with left padding, the same for all sequences.
        decoding: the running pass is a decode step: one token each, behind a prompt.
        step_lengths: [N], int32; in a pass that stands for N decode steps, the sequence's length in each of them;
            `None` in every other pass.
    """

    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    new_lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    block_table: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.int32))
    padded_length: int = 0
    decoding: bool = False
    step_lengths: Tensor | None = None

    def begin(self, batch: int, new_tokens: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Starts a forward pass over `new_tokens` tokens for each sequence, left padding included.

        Raises:
            InputError: another number of sequences than the cache holds, or a mask that is not left-padded.
        """
        if self.padded_length > 0 and batch != len(self.lengths):
            raise InputError(f"the cache holds {len(self.lengths)} sequences, the input has {batch}: make a new one")
        padded_length = self.padded_length + new_tokens
        decoding = new_tokens == 1 and self.padded_length > 0
        unpadded = None if decoding or attention_mask is None else _unpadded(attention_mask, padded_length)
        if self.padded_length == 0:
            self._start(batch, device)
        if unpadded is None:
            self.new_lengths.fill_(new_tokens)
        else:
            self.new_lengths.copy_(unpadded - self.lengths)
        self.lengths.add_(self.new_lengths)
        self.padded_length, self.decoding, self.step_lengths = padded_length, decoding, None

    def begin_steps(self, steps: int, device: torch.device) -> Tensor:
        """Starts a forward pass over `steps` tokens of one sequence that stands for as many decode steps.

        Returns:
            `step_lengths`.
        """
        self.begin(1, steps, None, device)
        self.step_lengths = self.lengths + torch.arange(1 - steps, 1, dtype=torch.int32, device=device)
        return self.step_lengths

    def begin_chunk(self, new_tokens: int, new_lengths: Tensor | None) -> None:
        """Starts a forward pass over a chunk behind a prompt, in which each token attends to all before it.

        Also one token alone, which `begin` would take for a decode step.

        Args:
            new_tokens: tokens of the chunk, left padding included.
            new_lengths: [B], integer; tokens of each sequence, without padding; `None` for all of them.
        """
        if new_lengths is None:
            self.new_lengths.fill_(new_tokens)
        else:
            self.new_lengths.copy_(new_lengths)
        self.lengths.add_(self.new_lengths)
        self.padded_length += new_tokens
        self.decoding, self.step_lengths = False, None

    def _start(self, batch: int, device: torch.device) -> None:
        """Makes all sequences empty; the tensors stay where the batch is as large, so that graphs stay valid."""
        if len(self.lengths) == batch and self.lengths.device == device:
            self.lengths.zero_()
            return
        with torch.inference_mode(False):  # written in place by later passes, in whatever mode
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.new_lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.block_table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]

    def rewind(self, padded_length: int, lengths: Tensor) -> None:
        """Lets every sequence end at its own length, in place, so that graphs stay valid."""
        self.lengths.copy_(lengths)
        self.padded_length = padded_length

    def reset(self) -> None:
        """Forgets all sequences."""
        self.padded_length, self.decoding = 0, False


def _unpadded(attention_mask: Tensor, padded_length: int) -> Tensor:
    """Tokens of each sequence under a left-padded mask [B, padded_length]: [B]."""
    if attention_mask.ndim != 2 or attention_mask.shape[1] != padded_length:
        raise InputError(
            f"attention_mask must be [batch, {padded_length}], one entry a token, not {list(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    if not torch.equal(lengths, mask.flip(1).cumprod(1).sum(1)):
        raise InputError(
            "attention_mask must pad on the left only: set padding_side='left' on the tokenizer, "
            "or pass the mask of a prompt that holds the padding token itself"
        )
    return lengths


class TidalLayer(CacheLayerMixin):
    """K and V of one layer that attends to the whole context.

    Attributes:
        keys, values: [B, Hkv, capacity, D]; rows past a sequence's length are undefined.
    """

    is_sliding = False

    def __init__(self, sequences: Sequences, capacity: int, num_layers: int, first: bool) -> None:
        super().__init__()
        self.sequences = sequences
        self.capacity = capacity
        self.num_layers, self.first = num_layers, first  # the first of so many checks that all of them fit
        self.padded_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache for [B, Hkv, N, D] states.

        Raises:
            InputError: the caches of all layers together do not fit the GPU.
        """
        batch, heads, _, dim = key_states.shape
        if self.first:
            self._check_memory(key_states, value_states)
        with torch.inference_mode(False):  # a cache filled in inference mode must stay writable outside of it
            self.keys = key_states.new_empty(batch, heads, self.capacity, dim)
            self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def _check_memory(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.device.type != "cuda":
            return
        batch, heads, _, dim = key_states.shape
        per_token = batch * heads * (dim + value_states.shape[-1]) * key_states.element_size() * self.num_layers
        needed = per_token * self.capacity
        free = torch.cuda.mem_get_info(key_states.device)[0]
        free += torch.cuda.memory_reserved(key_states.device) - torch.cuda.memory_allocated(key_states.device)
        if self.is_initialized:  # of another batch: each layer gives back its own
            free += (self.keys.nbytes + self.values.nbytes) * self.num_layers
        if needed > free:
            raise InputError(
                f"the KV cache of {batch} x {self.capacity:,} tokens in {self.num_layers} layers needs "
                f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of the GPU are free: "
                f"{free // per_token:,} tokens fit"
            )

    def prepare(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for sequences of [B, Hkv, N, D] states, if there is none for so many."""
        if not self.is_initialized or (self.padded_length == 0 and len(self.keys) != len(key_states)):
            self.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the K and V of new tokens, [B, Hkv, N, D], behind the others. Returns the whole cache."""
        self.prepare(key_states, value_states)
        sequences = self.sequences
        self.padded_length += key_states.shape[2]
        if sequences.padded_length == 0:
            raise InputError("a TidalCache works only with the model that tidaldecode.apply was called on")
        if self.padded_length != sequences.padded_length:
            raise InputError("the cache was left in the middle of a forward pass: reset() it or make a new one")
        ops.write_kv(
            key_states.transpose(1, 2),
            value_states.transpose(1, 2),
            *self.blocks(),
            sequences.block_table,
            sequences.lengths,
            sequences.new_lengths,
        )
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def blocks(self) -> tuple[Tensor, Tensor]:
        """K and V as the operations address them: one block per sequence, [B, capacity, Hkv, D]."""
        assert self.keys is not None and self.values is not None
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.padded_length = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is needed: this layer's attention goes by the lengths."""
        return 0, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache, left padding counted, as Transformers counts positions."""
        return self.padded_length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.capacity


class WindowLayer(StaticSlidingWindowLayer):
    """K and V of one layer that attends to a sliding window: Transformers' own, writable in whatever mode."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the window for [B, Hkv, N, D] states."""
        with torch.inference_mode(False):
            super().lazy_initialization(key_states, value_states)


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
        capacity: tokens to allocate for each sequence, prompt and new tokens together.

    Raises:
        InputError: there is no such plan, or it does not fit the model.

    Attributes:
        attention: the plan at work, with the index sets of the latest step.
        sequences: lengths of the sequences.
        correction: when decoded tokens run again with full attention; `None` for never.
        rounds: what the rounds of the latest lossless generation drafted and accepted; `None` before the first.
    """

    def __init__(self, config: PreTrainedConfig, plan: PlanLike, capacity: int) -> None:
        self.config = config
        self.capacity = capacity
        self.sequences = Sequences()
        self.correction: Correction | None = None
        self.rounds: Rounds | None = None
        self.chunks: dict[int, CapturedStep] = {}  # captured passes over so many tokens with full attention
        self.chunks_refused: set[int] = set()
        self.use_plan(plan)
        windows = sliding_windows(config)
        num_global = windows.count(None)
        super().__init__(
            layers=[
                TidalLayer(self.sequences, capacity, num_global, first=layer == windows.index(None))
                if window is None
                else WindowLayer(max_cache_len=capacity, sliding_window=window)
                for layer, window in enumerate(windows)
            ]
        )

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
        sequences = self.sequences
        for index, layer in enumerate(self.layers):
            if isinstance(layer, TidalLayer):
                self.attention.prepare(index, layer.blocks()[0], sequences.block_table, sequences.lengths)
        self._prepared = True

    def begin(self, batch: int, new_tokens: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Starts a forward pass over [batch, new_tokens] tokens.

        Args:
            attention_mask: [batch, tokens so far with these], ones and zeros, left-padded; `None` for no padding.

        Raises:
            InputError: the tokens do not fit, or the mask is not left-padded.
        """
        self._check_room(new_tokens)
        self._check_whole()
        lengths = self.sequences.lengths
        self.sequences.begin(batch, new_tokens, attention_mask, device)
        if self.sequences.lengths is not lengths:
            self.step = self._drafts = None
            self.chunks.clear()
        self._attended = 0
        self._prepared = self._prepared and self.sequences.decoding
        if self.sequences.decoding:
            self.prepare()
            self.attention.begin(self.sequences.lengths, self.capacity)

    def begin_chunk(self, new_tokens: int, new_lengths: Tensor | None = None) -> None:
        """Starts a forward pass over a chunk behind a prompt, in which each token attends to all before it.

        Args:
            new_tokens: tokens of the chunk, left padding included.
            new_lengths: [batch], integer; tokens of each sequence, without padding; `None` for all of them.

        Raises:
            InputError: the tokens do not fit.
        """
        self.check_chunk(new_tokens)
        self.sequences.begin_chunk(new_tokens, new_lengths)
        self._begin_verification()
        self._attended, self._prepared = 0, False

    def begin_steps(self, steps: int, device: torch.device) -> None:
        """Starts a forward pass over `steps` tokens of one sequence in which each attends as in a decode step.

        Raises:
            InputError: the tokens do not fit, or the cache holds several sequences.
        """
        self._check_room(steps)
        self._check_whole()
        lengths = self.sequences.begin_steps(steps, device)
        self._attended, self._prepared = 0, False
        self.step = None  # the attention allocates for as many sequences as there are steps
        self.attention.begin(lengths, self.capacity)

    def _check_room(self, new_tokens: int) -> None:
        total = self.sequences.padded_length + new_tokens
        if total > self.capacity:
            raise InputError(f"the cache holds {self.capacity} tokens, {total} are needed: make it with more capacity")

    def check_step(self, batch: int) -> None:
        """Refuses a decode step that the cache has no room for, before anything is written.

        Raises:
            InputError: it does not fit, or the cache holds another number of sequences.
        """
        self._check_room(1)
        sequences = self.sequences
        if batch != len(sequences.lengths):
            raise InputError(
                f"the cache holds {len(sequences.lengths)} sequences, the input has {batch}: make a new one"
            )
        self._check_whole()

    def check_chunk(self, new_tokens: int) -> None:
        """Refuses a chunk that the cache has no room for, before anything is written.

        Raises:
            InputError: it does not fit.
        """
        self._check_room(new_tokens)
        self._check_whole()

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
        k_cache, v_cache = self._write(layer, key, value)
        table, lengths = self.sequences.block_table, self.sequences.lengths
        return self.attention.attend(layer, query[:, :, 0], k_cache, v_cache, table, lengths, scale)[:, None]

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
        return self._attend_to_all(layer, query.transpose(1, 2), *self._write(layer, key, value), scale)

    def _attend_to_all(self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """Full attention of several new tokens, [B, N, Hq, D]; chooses what drafts read where they go by that."""
        sequences = self.sequences
        cache = k_cache, v_cache, sequences.block_table, sequences.lengths
        if isinstance(self.attention, VerifiedDrafts):
            return self.attention.verify(layer, query, *cache, sequences.new_lengths, scale)
        return ops.multi_query_attention(query, *cache, sequences.new_lengths, scale)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new K and V, [B, Hkv, N, D], in one layer; returns its blocks."""
        sequences = self.sequences
        blocks: tuple[Tensor, Tensor] = self.layers[layer].blocks()
        new = key.transpose(1, 2), value.transpose(1, 2)
        ops.write_kv(*new, *blocks, sequences.block_table, sequences.lengths, sequences.new_lengths)
        return blocks

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
        k_cache, v_cache = cached.blocks()
        if sequences.step_lengths is not None and not self.attention.is_full(layer):
            # each step is a sequence of its own to the operations, and all share the one block
            table = sequences.block_table.expand(len(sequences.step_lengths), 1)
            self.attention.prepare(layer, k_cache, sequences.block_table, sequences.lengths)
            return self.attention.attend(layer, query[0], k_cache, v_cache, table, sequences.step_lengths, scale)[None]
        if sequences.decoding:
            output = self.attention.attend(
                layer, query[:, 0], k_cache, v_cache, sequences.block_table, sequences.lengths, scale
            )
            return output[:, None]
        return self._attend_to_all(layer, query, k_cache, v_cache, scale)

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
            InputError: the cache holds fewer tokens than it did.
        """
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search is not supported."""
        raise InputError("a TidalCache can't follow beam search: use greedy decoding or sampling")
