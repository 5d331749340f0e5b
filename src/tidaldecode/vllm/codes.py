"""Codes of keys in vLLM's cache: layers of its own kind that hold nothing else.

A choosing layer's codes are the cache of one more layer, as the keys of a sparse indexer are in vLLM's own models. So
vLLM counts their bytes in a block, allocates them, shares and frees them with the block whose keys they are of, and
its connectors take them along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tidaldecode.errors import InputError
from tidaldecode.models import sliding_windows, steady_channels
from tidaldecode.ops import KeyCodes
from tidaldecode.ops.codes import rotation
from tidaldecode.ops.values import code_bytes
from tidaldecode.serving.rank import RankAttention


class CodesCache(torch.nn.Module, AttentionLayerBase):
    """The codes of a layer's keys, and their factors.

    Args:
        layer: index of the layer.
        bits: of a channel.
        steady: [D], float32; see `KeyCodes`.

    Attributes:
        kv_cache: [num_blocks, Hkv, block_size, bytes of a code and its factor], uint8, in the order of vLLM's blocks;
            bound by vLLM. The KV heads are those of this rank.
    """

    def __init__(self, layer: int, bits: int, steady: Tensor) -> None:
        super().__init__()
        self.layer, self.bits = layer, bits
        self.steady = steady
        self.kv_cache = torch.tensor([])

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Takes the memory; what goes with it lies beside it before a CUDA graph is captured.

        Raises:
            InputError: the bytes of a block do not follow each other.
        """
        if not kv_cache[0].is_contiguous():
            raise InputError(
                f"vLLM laid out the codes of layer {self.layer} with strides {kv_cache.stride()}, and a block must "
                "lie in one piece: start without what changes the layout of its cache, such as a KV connector, or with "
                "a plan without quantized_select layers"
            )
        self.kv_cache, self.steady = kv_cache, self.steady.to(kv_cache.device)
        self.rotation = rotation(len(self.steady), kv_cache.device)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        """As many bytes for each token and KV head of the layer as its code and factor take."""
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        keys = next(layer for name, layer in layers.items() if extract_layer_index(name) == self.layer)
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=keys.num_kv_heads,
            head_size=code_bytes(self.bits, keys.head_size),
            head_size_v=0,
            dtype=torch.uint8,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        """One that attends to nothing."""
        return CodesBackend

    def codes(self) -> KeyCodes:
        """The codes as operations see them: in each block those of all its tokens head by head, then their factors."""
        blocks, heads, tokens, size = self.kv_cache.shape
        bytes_ = self.kv_cache.as_strided((blocks, heads * tokens * size), (self.kv_cache.stride(0), 1))
        packed, factors = torch.split(bytes_, [heads * tokens * (size - 2), heads * tokens * 2], 1)
        return KeyCodes(
            packed.view(blocks, heads, tokens, size - 2).transpose(1, 2),
            factors.view(torch.float16).view(blocks, heads, tokens).transpose(1, 2),
            self.rotation,
            self.steady,
        )


class CodesBuilder(AttentionMetadataBuilder[None]):
    """Builds nothing: the codes go with the batch of the layer whose keys they are of."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> None:
        """See the class."""


class CodesBackend(AttentionBackend):
    """What vLLM asks of a layer that has a cache: blocks as those of the keys, in any order of layers and blocks."""

    @staticmethod
    def get_name() -> str:
        """A name for vLLM's messages."""
        return "TIDALDECODE_CODES"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """There is none."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[CodesBuilder]:
        """`CodesBuilder`."""
        return CodesBuilder


def keep_codes(config: VllmConfig, attention: RankAttention) -> None:
    """Lets an engine keep the codes that a plan's layers choose by.

    Raises:
        InputError: layers with sliding windows have blocks of their own, among which codes would take up whole ones.
    """
    bits = {layer: attention.code_bits(layer) for layer in range(attention.shape.num_layers)}
    model = config.model_config.hf_text_config
    steady = torch.tensor(steady_channels(model), dtype=torch.float32, device="cpu")
    caches = {_name(layer): CodesCache(layer, its, steady) for layer, its in bits.items() if its}
    windows = any(window is not None for window in sliding_windows(model))
    if caches and windows and not config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise InputError(
            "the plan keeps codes of keys, and the model has layers with sliding windows: start with "
            "--disable-hybrid-kv-cache-manager, or with a plan without quantized_select layers"
        )
    config.compilation_config.static_forward_context.update(caches)


def codes_of(config: VllmConfig, layer: int) -> CodesCache | None:
    """The codes of a layer's keys, if it keeps any."""
    found: CodesCache | None = config.compilation_config.static_forward_context.get(_name(layer))
    return found


def _name(layer: int) -> str:
    """What vLLM calls the codes of a layer: with one number, by which it orders layers."""
    return f"tidaldecode.codes.{layer}"
