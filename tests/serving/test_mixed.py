"""Many requests at once, some aborted, under a KV cache too small for all: each answers as it does alone."""

from __future__ import annotations

import numpy as np
from engines import attention_of, greedy, tiny_plan, with_plan
from vllm import LLM, SamplingParams

NEW_TOKENS = 160
SOURCES = {2: ["1:unified"] * 2 + ["1:per_head:0"] * 2, 5: ["4:unified"] * 4}
OPTIONS = {
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "block_size": 32,
    "max_model_len": 6200,
    "kv_cache_memory_bytes": 7 * 2 * 2 * 32 * 4 * 6400,  # of 6,400 tokens
}


def _prompts() -> list[list[int]]:
    """32 prompts of 100 to 6,000 tokens, the short ones first; every fourth begins as the last one does."""
    random = np.random.default_rng(0)
    prompts = [random.integers(2, 258, int(length)).tolist() for length in np.geomspace(100, 6000, 32)]
    for prompt in prompts[::4]:
        prompt[: len(prompt) // 2] = prompts[-1][: len(prompt) // 2]
    return prompts


ABORTED = {4: 2, 40: 23, 90: 11}
"""Requests by the step after which they are aborted: while they are read, decode, or wait."""


def _at_once(engine: LLM, prompts: list[list[int]]) -> tuple[dict[int, list[int]], int]:
    """Answers to all prompts but the aborted ones, and how often a request was preempted."""
    core, answers, steps = engine.llm_engine, {}, 0
    preemptions: dict[str, int] = {}
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    ids = [core.add_request(str(i), {"prompt_token_ids": prompt}, params) for i, prompt in enumerate(prompts)]
    scheduler = core.engine_core.engine_core.scheduler
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
        preemptions |= {name: request.num_preemptions for name, request in scheduler.requests.items()}
        if steps in ABORTED:
            core.abort_request([ids[ABORTED[steps]]], internal=True)
    return answers, sum(preemptions.values())


def test_each_answer_is_the_one_that_the_request_gets_alone(start, tiny_llama, tmp_path):
    prompts = _prompts()
    options = with_plan(tiny_plan(tmp_path, 48, "per_head", SOURCES))
    engine = start(tiny_llama, **OPTIONS, **options)
    answers, preempted = _at_once(engine, prompts)
    assert preempted >= 2
    assert set(answers) == set(range(32)) - set(ABORTED.values())
    assert attention_of(engine).read_counts.fraction < 0.7
    assert engine.llm_engine.engine_core.engine_core.scheduler.cache_config.enable_prefix_caching
    alone = start(tiny_llama, max_num_seqs=1, enable_prefix_caching=False, **options)
    expected = {i: greedy(alone, [prompts[i]], NEW_TOKENS)[0] for i in answers}
    assert answers == expected
