"""The K and V of one layer: of the whole context, or of a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from tidaldecode import ops
from tidaldecode.errors import InputError, MemoryShortError
from tidaldecode.hf.sequences import Sequences
from tidaldecode.ops import KV, KeyCodes
from tidaldecode.ops.codes import room_for_codes
from tidaldecode.ops.values import code_bytes

LEFT_IN_THE_MIDDLE = "the cache was left in the middle of a forward pass: reset() it or make a new one"


class TidalLayer(CacheLayerMixin):
    """K and V of one layer that attends to the whole context.

    Attributes:
        keys, values: [B, Hkv, capacity, D]; rows past a sequence's length are undefined.
        codes: of the keys; `None` where nobody chooses by them.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, sequences: Sequences, num_layers: int, first: bool) -> None:
        super().__init__()
        self.sequences = sequences
        self.num_layers, self.first = num_layers, first  # the first of so many checks that all of them fit
        self.padded_length = 0
        self.code_bits = 0
        self.bits_of_all: list[int] = []  # code bits of each layer, for the check
        self.steady: Tensor | None = None  # [D]; see `KeyCodes`
        self.codes: KeyCodes | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache for [B, Hkv, N, D] states.

        Raises:
            InputError: the caches of all layers together do not fit the GPU.
        """
        capacity = self.sequences.capacity
        if self.first:
            self.check_memory(key_states, value_states, capacity)
        self._place(_room_like(key_states, capacity), _room_like(value_states, capacity))
        self.is_initialized = True

    def _place(self, keys: Tensor, values: Tensor, codes: KeyCodes | None = None) -> None:
        """Takes K, V and the codes of the tokens that are there; without them, room for codes."""
        if codes is None and self.code_bits:
            codes = self._room_for_codes(keys, self.code_bits)
        self.keys, self.values, self.codes = keys, values, codes
        self.sequences.moves += 1

    def _room_for_codes(self, keys: Tensor, bits: int) -> KeyCodes:
        return room_for_codes(keys.transpose(1, 2), bits, self.steady)

    def codes_of(self, bits: int) -> KeyCodes | None:
        """Codes of so many bits of the tokens that are there; `None` of 0 bits, or where there is no cache yet."""
        if bits == self.code_bits:
            return self.codes
        if not bits or not self.is_initialized:
            return None
        codes = self._room_for_codes(self.keys, bits)
        self._write(codes)
        return codes

    def use_codes(self, bits: int, codes: KeyCodes | None) -> None:
        """Keeps these codes, from `codes_of`, and those of the tokens that follow; of 0 bits, none."""
        if bits != self.code_bits:
            self.codes, self.code_bits = codes, bits
            self.sequences.moves += 1

    def code_all(self) -> None:
        """Codes the tokens that are there; those that are written later are coded as they are."""
        if self.codes is not None:
            self._write(self.codes)

    def _write(self, codes: KeyCodes) -> None:
        if self.padded_length > 0:
            lengths = self.sequences.lengths
            ops.write_codes(replace(self.kv(), codes=codes), lengths, len(lengths) * self.padded_length)

    def check_memory(self, key_states: Tensor, value_states: Tensor, capacity: int) -> None:
        """Looks whether the K and V of all layers fit the GPU, where these are a layer's.

        Args:
            key_states, value_states: [B, Hkv, any, D].
            capacity: tokens to have room for in each sequence.

        Raises:
            InputError: they do not.
        """
        if key_states.device.type != "cuda":
            return
        batch, heads, _, dim = key_states.shape
        per_token = batch * heads * (dim + value_states.shape[-1]) * key_states.element_size() * self.num_layers
        per_token += batch * heads * sum(code_bytes(bits, dim) for bits in self.bits_of_all)
        needed = per_token * capacity
        free = _free_bytes(key_states.device)
        if self.is_initialized:  # each layer gives back its own, but not before it has the new ones
            free += (self.keys.nbytes + self.values.nbytes) * (self.num_layers - 1)
        if needed > free:
            raise MemoryShortError(
                f"the KV cache of {batch} x {capacity:,} tokens in {self.num_layers} layers needs "
                f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of the GPU are free: "
                f"{free // per_token:,} tokens fit"
            )

    def check_growth(self, capacity: int) -> None:
        """As `check_memory`, for the K and V that are there, if they are."""
        if self.is_initialized:
            self.check_memory(self.keys, self.values, capacity)

    def prepare(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for sequences of [B, Hkv, N, D] states, if there is none for such.

        Raises:
            InputError: the cache holds tokens of another dtype or device.
        """
        alike = self.is_initialized and self.keys.dtype == key_states.dtype and self.keys.device == key_states.device
        if alike and (self.padded_length > 0 or len(self.keys) == len(key_states)):
            return
        if self.is_initialized and self.padded_length > 0:
            raise InputError(
                f"the cache holds {_kind(self.keys)}, the model goes on in {_kind(key_states)}: "
                "move the model back, or reset() the cache"
            )
        self.lazy_initialization(key_states, value_states)

    def grow(self, capacity: int) -> None:
        """Makes room for so many tokens of each sequence, if there is less; those that are there stay."""
        if not self.is_initialized or self.keys.shape[2] >= capacity:
            return
        there = slice(self.padded_length)
        keys, values = _room_like(self.keys, capacity), _room_like(self.values, capacity)
        for new, rows in ((keys, self.keys), (values, self.values)):
            new[:, :, there].copy_(rows[:, :, there])
        codes = None
        if self.codes is not None:
            codes = self._room_for_codes(keys, self.code_bits)
            codes.packed[:, there].copy_(self.codes.packed[:, there])
            codes.factors[:, there].copy_(self.codes.factors[:, there])
        self._place(keys, values, codes)

    def take(self, rows: Tensor) -> None:
        """Keeps these sequences alone, in this order, some perhaps several times; `rows` is [N], int64."""
        rows = rows.to(self.keys.device)
        with torch.inference_mode(False):
            keys, values, codes = self.keys.index_select(0, rows), self.values.index_select(0, rows), None
            if self.codes is not None:
                codes = self._room_for_codes(keys, self.code_bits)  # which lie as kernels read them
                codes.packed.copy_(self.codes.packed.index_select(0, rows))
                codes.factors.copy_(self.codes.factors.index_select(0, rows))
            self._place(keys, values, codes)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the K and V of new tokens, [B, Hkv, N, D], behind the others. Returns the whole cache."""
        if self.sequences.padded_length == 0:
            raise InputError("a TidalCache works only with the model that tidaldecode.apply was called on")
        self.prepare(key_states, value_states)
        self.padded_length += key_states.shape[2]
        if self.padded_length != self.sequences.padded_length:
            raise InputError(LEFT_IN_THE_MIDDLE)
        self.write(key_states, value_states)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Writes the K and V of the running pass's tokens, [B, Hkv, N, D], on the device alone."""
        new = key_states.transpose(1, 2), value_states.transpose(1, 2)
        ops.write_kv(*new, self.kv(), self.sequences.new_lengths)

    def kv(self) -> KV:
        """The layer's cache as the operations address it: one block per sequence, [B, capacity, Hkv, D]."""
        assert self.keys is not None and self.values is not None
        sequences = self.sequences
        k, v = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        return KV(k, v, sequences.block_table, sequences.lengths, self.codes)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.padded_length = 0

    def offload(self) -> None:
        """Refused: a decode step reads K and V where they are."""
        raise InputError("a TidalCache can't be offloaded: its K and V stay on the model's device")

    def prefetch(self) -> None:
        """Nothing was offloaded."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is needed: this layer's attention goes by the lengths."""
        return 0, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache, left padding counted, as Transformers counts positions."""
        return self.padded_length

    def get_max_length(self) -> int:
        """None, which Transformers writes as -1: the layer grows."""
        return -1


def _room_like(states: Tensor, capacity: int) -> Tensor:
    """Room for K or V as these, [B, Hkv, any, D]: [B, Hkv, capacity, D]."""
    batch, heads, _, dim = states.shape
    with torch.inference_mode(False):  # a cache filled in inference mode must stay writable outside of it
        return states.new_empty(batch, heads, capacity, dim)


def check_codes(wanted: Sequence[tuple[TidalLayer, int]]) -> None:
    """Looks whether each layer's codes of so many bits fit the GPU beside what the layers hold.

    Raises:
        MemoryShortError: they do not.
    """
    new = [(layer.keys, bits) for layer, bits in wanted if layer.is_initialized and bits != layer.code_bits]
    if not new or new[0][0].device.type != "cuda":
        return
    batch, _, capacity, _ = new[0][0].shape
    needed = sum(keys.shape[:-1].numel() * code_bytes(bits, keys.shape[-1]) for keys, bits in new)
    free = _free_bytes(new[0][0].device)
    if needed > free:
        raise MemoryShortError(
            f"the codes of {batch} x {capacity:,} keys need {needed / 2**30:.3f} GiB, and {free / 2**30:.3f} GiB "
            f"of the GPU are free: {(needed - free) / 2**30:.3f} GiB are missing; take a plan of fewer key_bits or "
            "without quantized_select layers, or a shorter cache"
        )


def _free_bytes(device: torch.device) -> int:
    """What PyTorch can still allocate."""
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _kind(rows: Tensor) -> str:
    return f"{str(rows.dtype).removeprefix('torch.')} on {rows.device}"


class WindowLayer(DynamicSlidingWindowLayer):
    """K and V of one layer that attends to a sliding window: Transformers' own, as long as what is in the window.

    Not its static one: a decode step goes without a mask where the window is longer than what was allocated for it, and
    would attend to rows that no token was written to.
    """

    is_croppable = False

    def grow(self, capacity: int) -> None:
        """Nothing is allocated ahead."""

    def take(self, rows: Tensor) -> None:
        """Keeps these sequences alone, in this order, some perhaps several times; `rows` is [N], int64."""
        self.batch_select_indices(rows)
