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
from tidaldecode.hf.architecture import model_shape, sliding_windows
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
        """Starts a forward pass over `new_tokens` tokens for each sequence, left padding included."""
        if self.padded_length == 0:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.block_table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        self.decoding = new_tokens == 1 and self.padded_length > 0
        self.padded_length += new_tokens
        if self.decoding or attention_mask is None:
            self.new_lengths = torch.full_like(self.lengths, new_tokens)
        else:
            self.new_lengths = _unpadded(attention_mask, self.padded_length).to(self.lengths) - self.lengths
        self.lengths = self.lengths + self.new_lengths

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every sequence."""
        self.lengths = self.lengths - tokens
        self.padded_length -= tokens


def _unpadded(attention_mask: Tensor, padded_length: int) -> Tensor:
    """Tokens of each sequence under a left-padded mask [B, padded_length]: [B]."""
    if attention_mask.ndim != 2 or attention_mask.shape[1] != padded_length:
        raise InputError(
            f"attention_mask must be [batch, {padded_length}], one entry a token, not {list(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    if not torch.equal(lengths, mask.flip(1).cumprod(1).sum(1)):
        raise InputError("attention_mask must pad on the left only: set padding_side='left' on the tokenizer")
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
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        sequences = self.sequences
        self.padded_length += key_states.shape[2]
        if self.padded_length != sequences.padded_length:
            raise InputError("a TidalCache works only with the model that tidaldecode.apply was called on")
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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is needed: this layer's attention goes by the lengths."""
        return 0, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache, left padding counted, as Transformers counts positions."""
        return self.padded_length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.capacity


class TidalCache(Cache):
    """The cache that a model with a plan decodes with; `generate` makes one, a loop of your own passes it.

    Args:
        config: the model's configuration.
        plan: the plan that was applied to the model.
        capacity: tokens to allocate for each sequence, prompt and new tokens together.

    Attributes:
        attention: the plan at work, with the index sets of the latest step.
        sequences: lengths of the sequences.
    """

    def __init__(self, config: PreTrainedConfig, plan: TidalPlan, capacity: int) -> None:
        self.capacity = capacity
        self.sequences = Sequences()
        self.shape = model_shape(config)
        self.attention = DecodeAttention(plan, self.shape)
        super().__init__(
            layers=[
                TidalLayer(self.sequences, capacity)
                if window is None
                else StaticSlidingWindowLayer(max_cache_len=capacity, sliding_window=window)
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
        if self.sequences.decoding:
            self.attention.begin(self.sequences.lengths, self.capacity)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of a layer with a role over its cache, after `update`.

        Args:
            query: [B, N, Hq, D], the new tokens, left-padded.

        Returns:
            [B, N, Hq, D].
        """
        sequences = self.sequences
        k_cache, v_cache = self.layers[layer].blocks()
        if sequences.decoding:
            output = self.attention.attend(
                layer, query[:, 0], k_cache, v_cache, sequences.block_table, sequences.lengths, scale
            )
            return output[:, None]
        return ops.multi_query_attention(
            query, k_cache, v_cache, sequences.block_table, sequences.lengths, sequences.new_lengths, scale
        )

    def use_plan(self, plan: TidalPlan) -> None:
        """Lets the steps that follow go by another plan: after `crop`, one prompt serves several."""
        self.attention = DecodeAttention(plan, self.shape)

    def has_role(self, layer: int) -> bool:
        """Whether the plan gives the layer a role; the others keep their sliding window."""
        return self.attention.plan.roles[layer] is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens of every sequence (the number is negative, as in Transformers).

        Raises:
            InputError: a layer keeps only a sliding window, whose older tokens are gone.
        """
        if not all(isinstance(layer, TidalLayer) for layer in self.layers):
            raise InputError("a cache with sliding-window layers can't be cropped")
        self.sequences.crop(-tokens_to_remove)
        for layer in self.layers:
            layer.padded_length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search is not supported."""
        raise InputError("a TidalCache can't follow beam search: use greedy decoding or sampling")
