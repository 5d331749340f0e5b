"""Many requests at once, some aborted, under a KV cache too small for all: each answers as it does alone."""

from __future__ import annotations

from engines import ABORTED, at_once, attention_of, greedy, prompts_of_all_lengths, tiny_plan, with_plan

NEW_TOKENS = 160
SOURCES = {2: ["1:unified"] * 2 + ["1:per_head:0"] * 2, 5: ["4:unified"] * 4}
OPTIONS = {
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "block_size": 32,
    "max_model_len": 6200,
    "kv_cache_memory_bytes": 7 * 2 * 2 * 32 * 4 * 6400,  # of 6,400 tokens
}


def test_each_answer_is_the_one_that_the_request_gets_alone(start, tiny_llama, tmp_path):
    prompts = prompts_of_all_lengths(6000, range(2, 258))
    options = with_plan(tiny_plan(tmp_path, 48, "per_head", SOURCES))
    engine = start(tiny_llama, **OPTIONS, **options)
    answers, preempted = at_once(engine, prompts, NEW_TOKENS)
    assert preempted >= 2
    assert set(answers) == set(range(32)) - set(ABORTED.values())
    assert attention_of(engine).read_counts.fraction < 0.7
    assert engine.llm_engine.engine_core.engine_core.scheduler.cache_config.enable_prefix_caching
    alone = start(tiny_llama, max_num_seqs=1, enable_prefix_caching=False, **options)
    expected = {i: greedy(alone, [prompts[i]], NEW_TOKENS)[0] for i in answers}
    assert answers == expected
