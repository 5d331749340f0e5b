"""Layers that choose by codes of keys, in vLLM's cache: whose blocks they lie in, and what is answered."""

from __future__ import annotations

import pytest
import torch
from engines import CODED, at_once, attention_of, greedy, prompts_of_all_lengths, tiny_plan, with_plan
from transformers import AutoModelForCausalLM

import tidaldecode
from families import FAMILIES, plan_for
from tidaldecode import InputError
from tidaldecode.serving.rank import RankAttention
from tidaldecode.vllm.codes import CodesCache

CHUNKS = {"max_num_batched_tokens": 64, "block_size": 32, "max_num_seqs": 8}
PROMPTS = [torch.randint(2, 258, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 30, 131, 400)]
SHARED = [PROMPTS[3][:360] + prompt for prompt in (PROMPTS[0], PROMPTS[1])]


def test_blocks_in_one_piece_alone_are_taken():
    """Blocks may lie apart, as those of several layers in one page."""
    cache = CodesCache(1, 2, torch.ones(32))
    page = torch.zeros(6, 3, 2 * 16 * 10, dtype=torch.uint8)
    cache.bind_kv_cache(page[:, 1].view(6, 2, 16, 10))
    codes = cache.codes()
    codes.packed.fill_(1), codes.factors.fill_(1 + 2**-10)  # of no zero byte
    assert page[:, 1].all() and not page[:, ::2].any()
    for kv_cache in (page[:, 1].view(6, 16, 2, 10).transpose(1, 2), torch.zeros(2, 6, 16, 10).transpose(0, 1)):
        with pytest.raises(InputError, match="the codes of layer 1 with strides .* must lie in one piece") as caught:
            cache.bind_kv_cache(kv_cache)
        assert "\n" not in str(caught.value)
    assert cache.kv_cache.shape == (6, 2, 16, 10)


def _runner(engine):
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def test_a_budget_of_the_whole_context_answers_as_vllm_does(start, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(RankAttention, "is_short", lambda self, length: False)  # or vLLM itself would attend
    expected = greedy(start(tiny_llama, **CHUNKS), PROMPTS, 24)
    engine = start(tiny_llama, **CHUNKS, **with_plan(tiny_plan(tmp_path, 8192, "per_group", roles=CODED)))
    assert greedy(engine, PROMPTS, 24) == expected


def test_a_small_budget_and_shared_prefixes_answer_as_in_transformers(start, tiny_llama, tmp_path):
    plan = tiny_plan(tmp_path, 24, "per_group", roles=CODED)
    engine = start(tiny_llama, **CHUNKS, **with_plan(plan))
    prompts = PROMPTS + SHARED  # the last ones find the blocks of the one before them, and their codes
    answers = greedy(engine, PROMPTS, 24) + greedy(engine, SHARED, 24)
    cache = _runner(engine)
    counts = attention_of(engine).read_counts
    assert 0.2 < counts.fraction < 0.6
    model = tidaldecode.apply(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), plan)
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.tensor([prompt])
        output = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert output[0, len(prompt) :].tolist() == answer
    # a block of the cache holds K and V of 7 layers and codes of 3: 32 channels of 2 bits, and a factor
    kv, codes = 7 * 32 * 2 * 2 * 32 * 4, 3 * 32 * 2 * (32 * 2 // 8 + 2)
    assert cache.kv_cache_config.num_blocks == 2**29 // (kv + codes)
    kept = [
        layer for layer in cache.compilation_config.static_forward_context.values() if isinstance(layer, CodesCache)
    ]
    assert [layer.layer for layer in kept] == [1, 4, 6]


def test_preempted_requests_and_mixed_batches_answer_as_alone(start, tiny_llama, tmp_path):
    prompts = prompts_of_all_lengths(600, range(2, 258))[::3]
    options = with_plan(tiny_plan(tmp_path, 48, "per_head", roles=CODED))
    small = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "block_size": 32, "max_model_len": 700}
    engine = start(tiny_llama, **small, kv_cache_memory_bytes=7 * 2 * 2 * 32 * 4 * 900, **options)
    answers, preempted = at_once(engine, prompts, 30, aborted={9: 8})
    assert preempted >= 2
    alone = start(tiny_llama, max_num_seqs=1, enable_prefix_caching=False, **options)
    assert answers == {i: greedy(alone, [prompts[i]], 30)[0] for i in answers}


def test_windows_with_blocks_of_their_own_are_refused(start, tmp_path, byte_tokenizer):
    config = FAMILIES["gemma3_text"](head_dim=32, hidden_size=128, query_pre_attn_scalar=32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    plan = plan_for(config, token_budget=24)
    roles = ["quantized_select" if role == "select" else role for role in plan.roles]
    plan = tidaldecode.TidalPlan.validated(**plan.model_dump() | {"roles": roles, "key_bits": 2})
    plan.save(tmp_path / "plan.json")
    options = with_plan(str(tmp_path / "plan.json")) | {"max_model_len": 512, "max_num_batched_tokens": 64}
    with pytest.raises(InputError, match="start with --disable-hybrid-kv-cache-manager") as caught:
        start(tmp_path, **options)
    assert "\n" not in str(caught.value)
    answers = greedy(start(tmp_path, disable_hybrid_kv_cache_manager=True, **options), PROMPTS[2:], 16)
    tidaldecode.apply(model, plan)
    for prompt, answer in zip(PROMPTS[2:], answers, strict=True):
        row = torch.tensor([prompt])
        output = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert output[0, len(prompt) :].tolist() == answer
