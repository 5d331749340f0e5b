"""The KV cache of a model with a plan: allocated once, written in place, read by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, StaticSlidingWindowLayer

from tidaldecode import ops
from tidaldecode.attention import DecodeAttention
from tidaldecode.errors import InputError
from tidaldecode.hf.architecture import check_plan, model_shape, sliding_windows
from tidaldecode.plan import TidalPlan


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
    """

    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    new_lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    block_table: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.int32))
    padded_length: int = 0
    decoding: bool = False

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
            with torch.inference_mode(False):  # written in place by later passes, in whatever mode
                self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
                self.new_lengths = torch.zeros(batch, dtype=torch.int32, device=device)
                self.block_table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        if unpadded is None:
            self.new_lengths.fill_(new_tokens)
        else:
            self.new_lengths.copy_(unpadded - self.lengths)
        self.lengths.add_(self.new_lengths)
        self.padded_length, self.decoding = padded_length, decoding

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every sequence."""
        self.lengths.sub_(tokens).clamp_(min=0)
        self.padded_length -= tokens

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

    def __init__(self, sequences: Sequences, capacity: int) -> None:
        super().__init__()
        self.sequences = sequences
        self.capacity = capacity
        self.padded_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache for [B, Hkv, N, D] states."""
        batch, heads, _, dim = key_states.shape
        with torch.inference_mode(False):  # a cache filled in inference mode must stay writable outside of it
            self.keys = key_states.new_empty(batch, heads, self.capacity, dim)
            self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the K and V of new tokens, [B, Hkv, N, D], behind the others. Returns the whole cache."""
        if not self.is_initialized or (self.padded_length == 0 and len(self.keys) != len(key_states)):
            self.lazy_initialization(key_states, value_states)
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


class TidalCache(Cache):
    """The cache that a model with a plan decodes with; `generate` makes one, a loop of your own passes it.

    Args:
        config: the model's configuration.
        plan: the plan that was applied to the model.
        capacity: tokens to allocate for each sequence, prompt and new tokens together.

    Raises:
        InputError: the plan does not fit the model.

    Attributes:
        attention: the plan at work, with the index sets of the latest step.
        sequences: lengths of the sequences.
    """

    def __init__(self, config: PreTrainedConfig, plan: TidalPlan, capacity: int) -> None:
        self.config = config
        self.capacity = capacity
        self.sequences = Sequences()
        self.use_plan(plan)
        super().__init__(
            layers=[
                TidalLayer(self.sequences, capacity)
                if window is None
                else WindowLayer(max_cache_len=capacity, sliding_window=window)
                for window in sliding_windows(config)
            ]
        )

    def begin(self, batch: int, new_tokens: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Starts a forward pass over [batch, new_tokens] tokens.

        Args:
            attention_mask: [batch, tokens so far with these], ones and zeros, left-padded; `None` for no padding.

        Raises:
            InputError: the tokens do not fit, or the mask is not left-padded.
        """
        total = self.sequences.padded_length + new_tokens
        if total > self.capacity:
            raise InputError(f"the cache holds {self.capacity} tokens, {total} are needed: make it with more capacity")
        self.sequences.begin(batch, new_tokens, attention_mask, device)
        self._attended = 0
        if self.sequences.decoding:
            self.attention.begin(self.sequences.lengths, self.capacity)

    def attended_everywhere(self) -> bool:
        """Whether every layer with a role attended through this cache in the latest forward pass."""
        return self._attended == sum(role is not None for role in self.attention.plan.roles)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of a layer with a role over its cache, after `update`.

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
        if sequences.decoding:
            output = self.attention.attend(
                layer, query[:, 0], k_cache, v_cache, sequences.block_table, sequences.lengths, scale
            )
            return output[:, None]
        return ops.multi_query_attention(
            query, k_cache, v_cache, sequences.block_table, sequences.lengths, sequences.new_lengths, scale
        )

    def use_plan(self, plan: TidalPlan) -> None:
        """Lets the steps that follow go by another plan: after `crop`, one prompt serves several.

        Raises:
            InputError: the plan does not fit the model.
        """
        check_plan(plan, self.config)
        self.attention = DecodeAttention(plan, model_shape(self.config))

    def has_role(self, layer: int) -> bool:
        """Whether the plan gives the layer a role; the others keep their sliding window."""
        return self.attention.plan.roles[layer] is not None

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
        self.sequences.crop(-tokens_to_remove)
        for layer in self.layers:
            layer.padded_length += tokens_to_remove

    def reset(self) -> None:
        """Forgets all sequences; what is allocated stays."""
        self.sequences.reset()
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search is not supported."""
        raise InputError("a TidalCache can't follow beam search: use greedy decoding or sampling")
