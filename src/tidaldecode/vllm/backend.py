"""The attention backend: vLLM's own, but for tokens that a layer's role lets read less, or choose."""

from __future__ import annotations

import logging
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from vllm.config import (
    VllmConfig,
    get_current_vllm_config,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.attention import Attention

from tidaldecode import ops
from tidaldecode.models import check_architecture, model_shape
from tidaldecode.ops import KV
from tidaldecode.serving.batch import NewTokens, Step
from tidaldecode.serving.gpu import check_kernels, memory_left
from tidaldecode.serving.rank import Limits, RankAttention
from tidaldecode.serving.settings import Settings
from tidaldecode.vllm.cache_layout import cache_views
from tidaldecode.vllm.codes import CodesCache, keep_codes
from tidaldecode.vllm.metadata import TidalDecodeBuilder
from tidaldecode.vllm.own_backend import own_backend
from tidaldecode.vllm.support import check_engine, check_layer, check_room

_log = logging.getLogger("vllm.tidaldecode")

_Backend: Any = own_backend()
_Impl: Any = _Backend.get_impl_cls()


class TidalDecodeBackend(_Backend):
    """vLLM's own backend, with TidalDecode's builder and attention."""

    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_name() -> str:
        """The name under which it is registered."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """`TidalDecodeImpl`."""
        return TidalDecodeImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """`TidalDecodeBuilder`."""
        return TidalDecodeBuilder

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """VLLM's own reasons against it; what concerns the whole engine is told before, in words of ours."""
        config = get_current_vllm_config_or_none()
        if config is not None:
            check_engine(config)
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        return reasons

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: how our kernels cut a sequence goes by the lengths of all."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """No."""
        return False


class TidalDecodeImpl(_Impl):
    """Attention of one layer.

    Arguments as of vLLM's own; the engine's configuration is checked, and the plan found, when the first layer is made.

    Attributes:
        attention: the plan at work, one for all layers.
        layer: index of the layer; set by the builder.
        codes: of the layer's keys, if it chooses by them; set by the builder.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = signature(super().__init__).bind(*args, **kwargs).arguments
        check_layer(given)
        check_kernels(torch.get_default_device(), torch.get_default_dtype(), given["head_size"])
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.attention = _attention_of(config)
        cache = config.cache_config
        self._utilization = 1.0 if cache.kv_cache_memory_bytes else cache.gpu_memory_utilization
        self.layer = -1
        self.codes: CodesCache | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a batch; K and V of its tokens are in the cache.

        Args:
            layer, key, value, output_scale, output_block_scale: for vLLM's own backend.
            query: [tokens, Hq, D].
            kv_cache: [num_blocks, Hkv, block_size, 2 · D].
            attn_metadata: vLLM's own, with a `Step` and `NewTokens`; `None` in a trial run.
            output: [tokens, Hq, D], written.
        """
        if attn_metadata is None:
            self._reserve(query.device)
        elif self.codes is not None:
            self._write_codes(kv_cache, attn_metadata.tidal_new)
        step: Step | None = None if attn_metadata is None else attn_metadata.tidal
        if step is None or self.attention.reads_everything(self.layer):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if step.prompts is not None:
            part = slice(step.prompts.first_token, None)
            super().forward(layer, query[part], key[part], value[part], kv_cache, step.prompts.metadata, output[part])
        codes = None if self.codes is None else self.codes.codes()
        kv = KV(*cache_views(kv_cache), step.block_table, step.lengths, codes)
        output[step.tokens] = self.attention.attend(self.layer, query[step.tokens], kv, self.scale)
        return output

    def _write_codes(self, kv_cache: Tensor, new: NewTokens) -> None:
        """Codes the keys of a batch, whichever way its tokens attend."""
        assert self.codes is not None
        kv = KV(*cache_views(kv_cache), new.block_table, new.lengths, self.codes.codes())
        ops.write_codes(kv, new.new_lengths, new.tokens)

    def _reserve(self, device: torch.device) -> None:
        """Makes room for the chosen tokens while vLLM measures how much memory a model takes."""
        if not self.attention.has_room:
            check_room(self.attention, memory_left(device, self._utilization))
            self.attention.reserve(device)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: our kernels write no quantized output."""
        return False


def _attention_of(config: VllmConfig) -> RankAttention:
    """The plan at work for a model: that of the layers made before, or a new one.

    Raises:
        InputError: TidalDecode can't work with the engine's configuration or the model, or the plan does not fit it.
    """
    for made in get_layers_from_vllm_config(config, Attention).values():
        if isinstance(made.impl, TidalDecodeImpl):
            return made.impl.attention
    check_engine(config)
    check_architecture(config.model_config.hf_config)
    model = config.model_config.hf_text_config
    plan = Settings.of(config.additional_config).plan_for(model)
    context = config.model_config.max_model_len
    scheduler = config.scheduler_config
    limits = Limits(context, scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    attention = RankAttention(plan, model_shape(model), get_tp_group(), limits)
    keep_codes(config, attention)
    if attention.group.rank_in_group > 0:
        return attention
    roles = {role: plan.roles.count(role) for role in ("full", "select", "quantized_select", "sparse")}
    if plan.key_bits is None:
        del roles["quantized_select"]
    _log.info(
        "tidaldecode: plan %s with a budget of %s tokens (%s): decoding reads %.1f%% of the KV cache at %d tokens",
        plan.name or "without a name",
        plan.budget_for(context),
        ", ".join(f"{count} {role.replace('_', ' ')} layers" for role, count in roles.items()),
        100 * attention.kv_read_fraction(context),
        context,
    )
    return attention
