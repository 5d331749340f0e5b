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


class _Known:
    """Lengths of prompts, as of a runner that has such requests; none in a trial run."""

    def __init__(self, prompts: list[int] | None) -> None:
        self.prompts = None if prompts is None else np.array(prompts, np.int64)

    def of(self, common: CommonAttentionMetadata) -> np.ndarray | None:
        return self.prompts


def _build(builder, new: list[int], lengths: list[int], prompts: list[int] | None, padding: int = 0):
    """The step that the builder makes of a batch."""
    builder._prompt_lengths = _Known(prompts)
    return builder.build(0, _batch(new, lengths, prompts, padding)).tidal


def _batch(new: list[int], lengths: list[int], prompts: list[int] | None, padding: int = 0) -> CommonAttentionMetadata:
    """A batch of requests with `new` tokens each, padded to more tokens; what is on the device is there twice."""
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    tokens = sum(new) + padding
    known = None if prompts is None else torch.tensor(prompts, dtype=torch.int32)
    computed = seq_lens - torch.tensor(new, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.clone(),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.clone(),
        num_reqs=len(new),
        num_actual_tokens=tokens,
        max_query_len=max(new),
        max_seq_len=max(lengths),
        block_table_tensor=torch.arange(len(new) * 2, dtype=torch.int32).view(-1, 2),
        slot_mapping=torch.arange(tokens),
        positions=torch.zeros(tokens, dtype=torch.int64),
        is_prefilling=torch.zeros(len(new), dtype=torch.bool) if known is None else computed < known,
        seq_lens_cpu_upper_bound=seq_lens,
    )


def test_one_token_each_is_decoded_whatever_the_padding(builder):
    step = _build(builder, [1, 1, 1], [40, 9, 100], [30, 8, 99], padding=5)
    assert step.tokens == slice(0, 3)
    assert step.lengths.tolist() == [40, 9, 100]
    assert step.prompts is None
    assert builder.attention.counts.tolist() == [32, 9, 32]


def test_decoding_requests_come_first_and_the_rest_is_vllms(builder):
    step = _build(builder, [1, 1, 6, 9], [40, 60, 6, 50], [30, 50, 6, 60])
    assert step.tokens == slice(0, 2)
    assert step.lengths.tolist() == [40, 60]
    assert step.block_table[:, 0].tolist() == [0, 2]
    assert step.prompts.first_token == 2
    metadata = step.prompts.metadata
    assert metadata.query_start_loc.tolist() == [0, 6, 15]
    assert metadata.seq_lens.tolist() == [6, 50]
    assert metadata.block_table[:, 0].tolist() == [4, 6]
    assert metadata.num_actual_tokens == 15
    assert (metadata.max_query_len, metadata.max_seq_len) == (9, 50)


def test_nothing_on_the_device_is_read_or_copied(builder, monkeypatch):
    common = _batch([1, 1, 6, 9], [40, 60, 6, 50], [30, 50, 6, 60])
    builder._prompt_lengths = _Known([30, 50, 6, 60])
    on_device = {common.seq_lens.data_ptr(), common.query_start_loc.data_ptr(), common.block_table_tensor.data_ptr()}

    def refused(read):
        def call(tensor, *args, **kwargs):
            assert tensor.data_ptr() not in on_device
            return read(tensor, *args, **kwargs)

        return call

    for name in ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refused(getattr(torch.Tensor, name)))
    step = builder._step(common)
    monkeypatch.undo()
    for part in (step.lengths, step.block_table, step.prompts.metadata.seq_lens, step.prompts.metadata.block_table):
        assert part.untyped_storage().data_ptr() in on_device


def test_a_prompt_token_among_decoding_requests_is_read_in_full(builder):
    step = _build(builder, [1, 1, 1, 4], [40, 30, 60, 20], [30, 30, 50, 20])
    assert step.tokens.tolist() == [0, 2]
    assert step.lengths.tolist() == [40, 60]
    assert step.block_table[:, 0].tolist() == [0, 4]
    assert step.prompts.first_token == 1
    assert step.prompts.metadata.seq_lens.tolist() == [30, 60, 20]


def test_what_was_generated_before_a_preemption_is_decoded_again(builder):
    step = _build(builder, [1, 6, 4], [40, 6, 20], [30, 6, 18])
    assert step.tokens.tolist() == [0, 9, 10]
    assert step.lengths.tolist() == [40, 19, 20]
    assert step.block_table[:, 0].tolist() == [0, 4, 4]
    assert step.prompts.first_token == 1
    assert step.prompts.metadata.query_start_loc.tolist() == [0, 6, 10]
    step = _build(builder, [1, 3], [40, 23], [30, 18])
    assert step.tokens.tolist() == [0, 1, 2, 3]
    assert step.lengths.tolist() == [40, 21, 22, 23]
    assert step.prompts is None


def test_short_sequences_are_vllms(builder):
    assert _build(builder, [1, 1], [32, 20], [30, 8]) is None
    assert _build(builder, [1, 40], [32, 90], [30, 90]) is None
    assert _build(builder, [1, 1], [33, 20], [30, 8]) is not None
    # what a graph is captured with is read when it is replayed with longer ones
    assert builder.build_for_cudagraph_capture(_batch([1], [20], [10])).tidal is not None


def test_short_sequences_ask_for_vllms_own_graph(builder, monkeypatch):
    config, attention = builder.vllm_config.compilation_config, builder.attention
    monkeypatch.setattr(config, "cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE)
    assert _build(builder, [1, 1], [32, 20], [30, 8]) is None and attention.wants_own
    assert _build(builder, [1, 1], [33, 20], [30, 8]) is not None and not attention.wants_own
    assert _build(builder, [1, 1], [32, 20], [30, 8]) is None and attention.wants_own
    assert builder.build_for_cudagraph_capture(_batch([1], [20], [10])).tidal is not None and not attention.wants_own
    monkeypatch.setattr(attention, "captures_own", True)
    assert builder.build_for_cudagraph_capture(_batch([1], [20], [10])).tidal is None


def test_prompts_alone_are_vllms(builder):
    assert _build(builder, [6, 1], [6, 50], [6, 50]) is None


def test_in_graphs_a_single_token_of_a_prompt_is_decoded(builder, monkeypatch):
    config = builder.vllm_config.compilation_config
    monkeypatch.setattr(config, "cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE)
    step = _build(builder, [1, 1], [40, 50], [30, 50])
    assert step.tokens == slice(0, 2)


def test_trial_runs_and_captures_are_not_counted(builder):
    tokens = builder.attention.read_counts.decoded
    builder.build_for_cudagraph_capture(_batch([1, 1], [40, 50], [30, 40]))
    _build(builder, [1, 1], [40, 50], None)
    assert builder.attention.read_counts.decoded == tokens
    _build(builder, [1, 1], [40, 50], [30, 40])
    assert builder.attention.read_counts.decoded == tokens + 2


def test_a_group_can_do_no_more_in_graphs_than_vllms_own(builder):
    kind = type(builder)
    assert kind.get_cudagraph_support(builder.vllm_config, builder.kv_cache_spec) == AttentionCGSupport.NEVER


def _by_runner_v2(monkeypatch, builder, new, lengths, prompts, reqs: int, capture=False):
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
    rows = np.arange(len(new))[::-1]  # of the runner's table of requests
    table = None if prompts is None else np.array(prompts, np.int32)[rows]
    states = SimpleNamespace(num_reqs=0 if prompts is None else len(new), prompt_len=SimpleNamespace(np=table))
    runner = SimpleNamespace(req_states=states)
    monkeypatch.setattr(builder._prompt_lengths, "_runner", lambda: runner)
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
        req_idx=rows,
    )
    return metadata["layer"].tidal


def test_batches_of_the_other_model_runner(builder, monkeypatch):
    step = _by_runner_v2(monkeypatch, builder, [1, 1, 1], [40, 9, 100], None, reqs=4, capture=True)
    assert step.tokens == slice(0, 4)
    assert step.lengths.tolist() == [40, 9, 100, 0]
    step = _by_runner_v2(monkeypatch, builder, [1, 1], [40, 90], [30, 60], reqs=4)
    assert step.lengths.tolist() == [40, 90, 0, 0]
    step = _by_runner_v2(monkeypatch, builder, [1, 3, 5], [40, 12, 5], [30, 12, 3], reqs=3)
    assert step.tokens.tolist() == [0, 7, 8]
    assert step.lengths.tolist() == [40, 4, 5]
    assert step.prompts.metadata.seq_lens.tolist() == [12, 5]


def test_the_runner_says_how_long_prompts_are(builder, monkeypatch):
    common = _batch([1], [68], [64])
    assert builder._prompt_lengths.of(common).tolist() == [64]
    monkeypatch.setattr(builder._prompt_lengths._runner().input_batch, "req_id_to_index", {})
    assert builder._prompt_lengths.of(common) is None


def test_the_fields_that_it_replaces_are_there():
    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {"is_prefilling", "seq_lens_cpu_upper_bound", "req_idx"} <= names
