"""What the builder makes of batches as vLLM's runners pass them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engines import attention_of, greedy, tiny_plan, with_plan
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata


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


def test_captures_are_not_counted(builder):
    tokens = builder.attention.reads.tokens
    builder.build_for_cudagraph_capture(_batch([1, 1], [40, 50], None))
    assert builder.attention.reads.tokens == tokens
    builder.build(0, _batch([1, 1], [40, 50], None))
    assert builder.attention.reads.tokens == tokens + 2


def test_the_fields_that_it_replaces_are_there():
    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {"rswa_prefix_lens", "is_prefilling", "seq_lens_cpu_upper_bound", "req_idx"} <= names
