"""What the builder makes of batches as vLLM's runners pass them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import attention_of, greedy, tiny_plan, with_plan
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata


@pytest.fixture
def builder(start, tiny_llama, tmp_path):
    """The builder of an engine that has decoded already."""
    engine = start(tiny_llama, max_num_seqs=4, **with_plan(tiny_plan(tmp_path, 32, "unified")))
    greedy(engine, [list(range(2, 66))], 4)
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    found = runner.attn_groups[0][0].get_metadata_builder()
    assert found.attention is attention_of(engine)
    return found


def _batch(new: list[int], lengths: list[int], prompts: list[int] | None, padding: int = 0) -> CommonAttentionMetadata:
    """A batch of requests with `new` tokens each, padded to more tokens."""
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    tokens = sum(new) + padding
    known = None if prompts is None else torch.tensor(prompts, dtype=torch.int32)
    computed = seq_lens - torch.tensor(new, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(new),
        num_actual_tokens=tokens,
        max_query_len=max(new),
        max_seq_len=max(lengths),
        block_table_tensor=torch.arange(len(new) * 2, dtype=torch.int32).view(-1, 2),
        slot_mapping=torch.arange(tokens),
        positions=torch.zeros(tokens, dtype=torch.int64),
        is_prefilling=torch.zeros(len(new), dtype=torch.bool) if known is None else computed < known,
        seq_lens_cpu_upper_bound=seq_lens,
        rswa_prefix_lens=known,
    )


def test_one_token_each_is_decoded_whatever_the_padding(builder):
    step = builder.build(0, _batch([1, 1, 1], [40, 9, 100], [30, 8, 99], padding=5)).tidal
    assert step.tokens == slice(0, 3)
    assert step.lengths.tolist() == [40, 9, 100]
    assert step.prompts is None
    assert builder.attention.counts.tolist() == [32, 9, 32]


def test_prompts_go_to_vllm_and_the_rest_is_decoded(builder):
    step = builder.build(0, _batch([1, 6, 1, 4], [40, 6, 50, 20], [30, 6, 50, 18])).tidal
    assert step.tokens.tolist() == [0, 10, 11]
    assert step.lengths.tolist() == [40, 19, 20]
    assert step.block_table[:, 0].tolist() == [0, 6, 6]
    assert step.prompts.tokens == slice(1, 10)
    metadata = step.prompts.metadata
    assert metadata.query_start_loc.tolist() == [0, 6, 7, 9]
    assert metadata.seq_lens.tolist() == [6, 50, 18]
    assert metadata.block_table[:, 0].tolist() == [2, 4, 6]


def test_prompts_alone_are_vllms(builder):
    assert builder.build(0, _batch([6, 1], [6, 50], [6, 50])).tidal is None


def test_in_graphs_a_single_token_of_a_prompt_is_decoded(builder, monkeypatch):
    config = builder.vllm_config.compilation_config
    monkeypatch.setattr(config, "cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE)
    step = builder.build(0, _batch([1, 1], [40, 50], [30, 50])).tidal
    assert step.tokens == slice(0, 2)


def test_trial_runs_and_captures_are_not_counted(builder):
    tokens = builder.attention.reads.tokens
    builder.build_for_cudagraph_capture(_batch([1, 1], [40, 50], [30, 40]))
    builder.build(0, _batch([1, 1], [40, 50], None))
    assert builder.attention.reads.tokens == tokens
    builder.build(0, _batch([1, 1], [40, 50], [30, 40]))
    assert builder.attention.reads.tokens == tokens + 2


def test_a_group_can_do_no_more_in_graphs_than_vllms_own(builder):
    kind = type(builder)
    assert kind.get_cudagraph_support(builder.vllm_config, builder.kv_cache_spec) == AttentionCGSupport.NEVER


def _by_runner_v2(builder, new: list[int], lengths: list[int], prompts: list[int] | None, reqs: int, capture=False):
    """Metadata as model runner V2 has it built: lengths are padded to `reqs` requests, those of prompts are not."""
    group = SimpleNamespace(
        get_metadata_builder=lambda ubatch: builder,
        layer_names=["layer"],
        kv_cache_spec=builder.kv_cache_spec,
        build_metadata=lambda common, ubatch: builder.build(0, common),
        build_metadata_for_cudagraph_capture=lambda common, ubatch: builder.build_for_cudagraph_capture(common),
    )
    padding = [0] * (reqs - len(new))
    starts = torch.tensor([0, *np.cumsum(new + padding).tolist()], dtype=torch.int32)
    seq_lens = torch.tensor(lengths + padding, dtype=torch.int32)
    known = None if prompts is None else torch.tensor(prompts, dtype=torch.int32)
    computed = torch.tensor(lengths) - torch.tensor(new)
    metadata = build_attn_metadata(
        attn_groups=[[group]],
        num_reqs=reqs,
        num_tokens=sum(new) + len(padding),
        query_start_loc_gpu=starts,
        query_start_loc_cpu=starts,
        max_query_len=max(new),
        seq_lens=seq_lens,
        max_seq_len=max(lengths),
        block_tables=[torch.arange(reqs * 2, dtype=torch.int32).view(-1, 2)],
        slot_mappings=torch.zeros(1, sum(new) + len(padding), dtype=torch.int64),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer"])]),
        seq_lens_cpu_upper_bound=seq_lens,
        # there a request that was preempted is prefilling until all that it had generated is computed again
        is_prefilling=torch.zeros(len(new), dtype=torch.bool) if known is None else computed < known + 2,
        for_cudagraph_capture=capture,
        rswa_prefix_lens=known,
        req_idx=np.arange(len(new)),
    )
    return metadata["layer"].tidal


def test_batches_of_the_other_model_runner(builder):
    step = _by_runner_v2(builder, [1, 1, 1], [40, 9, 100], None, reqs=4, capture=True)
    assert step.tokens == slice(0, 4)
    assert step.lengths.tolist() == [40, 9, 100, 0]
    step = _by_runner_v2(builder, [1, 1], [40, 90], [30, 60], reqs=4)
    assert step.lengths.tolist() == [40, 90, 0, 0]
    step = _by_runner_v2(builder, [1, 5, 3], [40, 5, 12], [30, 3, 12], reqs=3)
    assert step.tokens.tolist() == [0, 4, 5]
    assert step.lengths.tolist() == [40, 4, 5]
    assert step.prompts.metadata.seq_lens.tolist() == [3, 12]


def test_the_fields_that_it_replaces_are_there():
    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {"rswa_prefix_lens", "is_prefilling", "seq_lens_cpu_upper_bound", "req_idx"} <= names
