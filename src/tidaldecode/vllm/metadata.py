"""What a forward pass must know of its batch: vLLM's own metadata, and which tokens the plan decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport

from tidaldecode.vllm.batch import Integers, Split, as_slice, split
from tidaldecode.vllm.parent import parent_backend

_Tokens = slice | Tensor

_Builder: Any = parent_backend().get_builder_cls()


@dataclass(frozen=True)
class Prompts:
    """The part of a batch that is prompts, as vLLM's own backend sees it.

    Attributes:
        tokens: where its tokens are in the batch.
        metadata: vLLM's own, of these tokens alone.
    """

    tokens: _Tokens
    metadata: Any


@dataclass(frozen=True)
class Step:
    """The tokens of a batch that the plan decodes; each is the last token of a sequence of its own.

    Attributes:
        tokens: where they are in the batch.
        block_table: [B, max_blocks], int32; the blocks of each one's sequence.
        lengths: [B], int32; tokens of the sequence, up to and with the decoded one; 0 in the padding of a CUDA graph.
        prompts: the rest of the batch; `None` if there is no more.
    """

    tokens: _Tokens
    block_table: Tensor
    lengths: Tensor
    prompts: Prompts | None = None


class TidalDecodeBuilder(_Builder):
    """Builds the metadata of a batch: vLLM's own, with a `Step` in its attribute `tidal`, or `None` if none decodes."""

    # a batch of one new token per request, whatever the lengths; batches with prompts run outside of CUDA graphs
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table = False  # the step's own would be forgotten

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # one more of vLLM's own, with buffers of its own, for the part of a batch that is prompts
        self._for_prompts = _Builder(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            layer.impl.layer = extract_layer_index(name)
        self.attention = next(iter(layers.values())).impl.attention
        scheduler = vllm_config.scheduler_config
        self.attention.reserve(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, device)
        indices = {layer.impl.layer for layer in layers.values()}
        self._works = not all(map(self.attention.reads_everything, indices))
        self._counts = self.attention.first_layer in indices

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Pure decode batches alone, and only if vLLM's own backend can do as much."""
        parents = _Builder.get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(parents, cls._cudagraph_support, key=lambda support: support.value)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The metadata of one batch, from what is common to all backends (`CommonAttentionMetadata`)."""
        prompt_lens = common_attn_metadata.rswa_prefix_lens
        common = common_attn_metadata.replace(rswa_prefix_lens=None)
        metadata = super().build(common_prefix_len, common, fast_build)
        metadata.tidal = self._step(common, prompt_lens)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """As `build`; a capture decodes nothing that counts."""
        counts, self._counts = self._counts, False
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._counts = counts

    def _step(self, common: Any, prompt_lens: Tensor | None) -> Step | None:
        if not self._works:
            return None
        one_each = common.max_query_len <= 1
        prefilling = common.is_prefilling is not None and bool(common.is_prefilling.any())
        if one_each and (self._in_graphs or not prefilling):
            if self._counts and prompt_lens is not None:  # there are none in a trial run
                self.attention.reads.count(common.seq_lens_cpu_upper_bound.numpy())
            self.attention.begin(common.seq_lens)
            return Step(slice(0, common.num_reqs), common.block_table_tensor, common.seq_lens)
        if prompt_lens is None:  # a trial run, or the first batch of all, which is prompts alone
            _ask_for_prompt_lengths(self.vllm_config.model_config)
            return None
        starts = common.query_start_loc_cpu.numpy().astype(np.int64)
        lengths = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        known = prompt_lens.cpu().numpy().astype(np.int64)  # on a GPU this waits for the step before
        of_prompt = np.zeros_like(lengths)
        of_prompt[: len(known)] = known[: len(lengths)]
        return self._mixed(common, split(starts, lengths, of_prompt, self.attention.most_rows))

    @property
    def _in_graphs(self) -> bool:
        """Whether a batch of one token per request runs in a CUDA graph, which knows decoded tokens alone.

        Then a prompt's token counts as one of them, if it is the only one of its prompt in such a batch.
        """
        mode = self.vllm_config.compilation_config.cudagraph_mode
        return mode is not None and mode.has_full_cudagraphs()

    def _mixed(self, common: Any, parts: Split) -> Step | None:
        if len(parts.decode_tokens) == 0:
            return None
        if self._counts:
            self.attention.reads.count(parts.decode_lengths)
        lengths = self._to_device(parts.decode_lengths, torch.int32)
        self.attention.begin(lengths)
        requests = as_slice(parts.decode_requests)
        table = common.block_table_tensor
        table = table[self._to_device(parts.decode_requests) if requests is None else requests]
        return Step(self._tokens(parts.decode_tokens), table, lengths, self._prompts(common, parts))

    def _prompts(self, common: Any, parts: Split) -> Prompts | None:
        if len(parts.prompt_tokens) == 0:
            return None
        tokens = self._tokens(parts.prompt_tokens)
        requests = self._tokens(parts.prompt_requests)
        before = common.seq_lens_cpu_upper_bound.numpy() - np.diff(common.query_start_loc_cpu.numpy())
        lengths = before[parts.prompt_requests] + parts.prompt_counts
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(parts.prompt_counts)]).astype(np.int32))
        part = common.replace(
            query_start_loc=starts.to(self.device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=self._to_device(lengths, torch.int32),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths.astype(np.int32)),
            num_reqs=len(lengths),
            num_actual_tokens=len(parts.prompt_tokens),
            max_query_len=int(parts.prompt_counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=common.block_table_tensor[requests],
            slot_mapping=common.slot_mapping[tokens],
            positions=None if common.positions is None else common.positions[tokens],
            is_prefilling=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return Prompts(tokens, self._for_prompts.build(0, part))

    def _tokens(self, tokens: Integers) -> _Tokens:
        follow = as_slice(tokens)
        return self._to_device(tokens) if follow is None else follow

    def _to_device(self, values: Integers, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(values).to(dtype).to(self.device, non_blocking=True)


def _ask_for_prompt_lengths(model_config: Any) -> None:
    """Lets vLLM's model runner tell a backend how long the requests' prompts are.

    It does so for models with reference sliding window attention, whose window is counted from the prompt's end
    (`CommonAttentionMetadata.rswa_prefix_lens`), and in no other way. A window of the whole context changes nothing in
    a model; vLLM's own layers and builders, which are made before, know nothing of it.
    """
    if model_config.rswa_window is None:
        model_config.model_arch_config.rswa_window = model_config.max_model_len
