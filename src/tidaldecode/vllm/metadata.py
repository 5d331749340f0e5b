"""What a forward pass must know of its batch: vLLM's own metadata, and which tokens the plan decodes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport

from tidaldecode.serving.batch import Integers, NewTokens, Prompts, Split, Step, split
from tidaldecode.vllm.codes import codes_of
from tidaldecode.vllm.graphs import capture_both
from tidaldecode.vllm.own_backend import own_backend
from tidaldecode.vllm.runner import PromptLengths

_log = logging.getLogger("vllm.tidaldecode")

_Builder: Any = own_backend().get_builder_cls()


class TidalDecodeBuilder(_Builder):
    """Builds the metadata of a batch: vLLM's own, with a `Step` in its attribute `tidal`.

    Where layers keep codes of keys there are `NewTokens` in `tidal_new`, too.

    The step is `None` where vLLM's own attention does all: if no token is decoded, and if no sequence that is decoded
    is longer than the budget. Which of two CUDA graphs is replayed follows from that, too.

    Nothing here waits for the device: what decides is known on the host, and what goes to the device is a part of what
    is there, or a copy that is not waited for.
    """

    # a batch of one new token per request, whatever the lengths; batches with prompts run outside of CUDA graphs
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table = False  # the step's own would be forgotten
    reorder_batch_threshold = 1  # requests with one new token come first; model runner V2 always does so

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # one more of vLLM's own, with buffers of its own, for the part of a batch that is prompts
        self._for_prompts = _Builder(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            layer.impl.layer = extract_layer_index(name)
            layer.impl.codes = codes_of(vllm_config, layer.impl.layer)
        self.attention = next(iter(layers.values())).impl.attention
        self.attention.reserve(device)
        indices = {layer.impl.layer for layer in layers.values()}
        self._codes = any(layer.impl.codes is not None for layer in layers.values())
        # for CUDA graphs, which read it where it is
        self._one_each = torch.ones(
            vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.int32, device=device
        )
        self._works = not all(map(self.attention.reads_everything, indices))
        self._counts = self.attention.first_layer in indices
        self._captures = self._seen = False
        self._prompt_lengths = PromptLengths()

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Pure decode batches alone, and only if vLLM's own backend can do as much."""
        parents = _Builder.get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(parents, cls._cudagraph_support, key=lambda support: support.value)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The metadata of one batch, from what is common to all backends (`CommonAttentionMetadata`)."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.tidal = self._step(common_attn_metadata)
        metadata.tidal_new = self._new(common_attn_metadata) if self._codes else None
        return metadata

    def _new(self, common: Any) -> NewTokens:
        if common.max_query_len <= 1:
            new, tokens = self._one_each[: common.num_reqs], common.num_reqs
        else:
            new, tokens = common.query_start_loc.diff(), common.num_actual_tokens
        return NewTokens(common.block_table_tensor, common.seq_lens, new, tokens)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """As `build`, of a trial run: what is captured is replayed for whatever lengths, and counts nothing."""
        self._captures = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._captures = False

    def _step(self, common: Any) -> Step | None:
        if not self._works:
            return None
        prompt_lens = None if self._captures else self._prompt_lengths.of(common)
        if prompt_lens is not None and not self._seen:
            self._seen = True  # the runner's first requests, which it makes up to warm up: graphs come after
            capture_both(self._prompt_lengths.runner, self.attention)
        one_each = common.max_query_len <= 1
        prefilling = common.is_prefilling is not None and bool(common.is_prefilling.any())
        if one_each and (self._in_graphs or not prefilling):
            # a graph that is replayed may read it, whatever the answer here
            self.attention.begin(common.seq_lens, None if self._captures else common.max_seq_len)
            known = prompt_lens is not None
            self.attention.wants_own = known and not self._decodes(common.seq_lens_cpu_upper_bound.numpy())
            if self.attention.wants_own or (self._captures and self.attention.captures_own):
                return None
            return Step(slice(0, common.num_reqs), common.block_table_tensor, common.seq_lens)
        if prompt_lens is None:
            return None
        starts = common.query_start_loc_cpu.numpy().astype(np.int64)
        lengths = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        return self._mixed(common, split(starts, lengths, prompt_lens, self.attention.most_rows))

    @property
    def _in_graphs(self) -> bool:
        """Whether a batch of one token per request runs in a CUDA graph, which knows decoded tokens alone.

        Then a prompt's token counts as one of them, if it is the only one of its prompt in such a batch.
        """
        mode = self.vllm_config.compilation_config.cudagraph_mode
        return mode is not None and mode.has_full_cudagraphs()

    def _decodes(self, lengths: Integers) -> bool:
        """Counts a step's sequences, and says whether the plan has a say in it: it has none where all are short."""
        if self._counts and (line := self.attention.read_counts.count(lengths)) is not None:
            _log.info("%s", line)
        return len(lengths) > 0 and not self.attention.is_short(int(lengths.max()))

    def _mixed(self, common: Any, parts: Split) -> Step | None:
        if not self._decodes(parts.lengths):
            return None
        tokens, requests = self._indices(parts.tokens), self._indices(parts.requests)
        if isinstance(requests, slice):
            lengths = common.seq_lens[requests]
        else:
            lengths = async_tensor_h2d(parts.lengths.astype(np.int32), device=self.device)
        self.attention.begin(lengths, int(parts.lengths.max()))
        return Step(tokens, common.block_table_tensor[requests], lengths, self._prompts(common, parts.first_prompt))

    def _prompts(self, common: Any, first: int) -> Prompts | None:
        """The requests from `first` on, as views of what is known of all."""
        if first == common.num_reqs:
            return None
        starts, lengths = common.query_start_loc_cpu[first:], common.seq_lens_cpu_upper_bound[first:]
        first_token, end = int(starts[0]), int(starts[-1])
        part = common.replace(
            query_start_loc=common.query_start_loc[first:] - first_token,
            query_start_loc_cpu=starts - first_token,
            seq_lens=common.seq_lens[first:],
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=common.num_reqs - first,
            num_actual_tokens=end - first_token,
            max_query_len=int(starts.diff().max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=common.block_table_tensor[first:],
            slot_mapping=common.slot_mapping[first_token:end],
            positions=None if common.positions is None else common.positions[first_token:end],
            is_prefilling=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return Prompts(first_token, self._for_prompts.build(0, part))

    def _indices(self, indices: slice | Integers) -> slice | Tensor:
        return indices if isinstance(indices, slice) else async_tensor_h2d(indices, device=self.device)
