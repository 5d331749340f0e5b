"""Greedy answers of real vLLM: its own with a large budget, those of the Transformers wing otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import attention_of, greedy, with_plan

import tidaldecode
from tidaldecode.plans import read_plan
from tidaldecode.serving.rank import RankAttention

PROMPTS, NEW_TOKENS = 20, 10


@pytest.fixture(scope="module")
def prompts(demo_tokenizer) -> list[list[int]]:
    text = (Path(__file__).parents[2] / "examples" / "moby_dick_101-103.txt").read_text(encoding="utf-8")
    ids = demo_tokenizer(text)["input_ids"]
    return [ids[300 * i : 300 * i + 100 + 8 * i] for i in range(PROMPTS)]


def test_a_budget_of_the_whole_context_answers_as_vllm_does(start, demo_files, prompts, monkeypatch):
    monkeypatch.setattr(RankAttention, "is_short", lambda self, length: False)  # or vLLM itself would attend
    expected = greedy(start(demo_files.location), prompts, NEW_TOKENS)
    engine = start(demo_files.location, **with_plan("smollm2-135m", 8192))
    assert greedy(engine, prompts, NEW_TOKENS) == expected
    assert attention_of(engine).read_counts.fraction == 1


def test_a_small_budget_answers_as_in_transformers(start, demo_files, demo_model, prompts):
    engine = start(demo_files.location, max_num_batched_tokens=256, **with_plan("auto", 64))
    answers = greedy(engine, prompts, NEW_TOKENS)
    counts = attention_of(engine).read_counts
    assert counts.decoded == PROMPTS * (NEW_TOKENS - 1)
    assert 0.2 < counts.fraction < 0.8
    tidaldecode.apply(demo_model, read_plan("smollm2-135m").with_budget(64))
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.tensor([prompt])
        output = demo_model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        assert output[0, len(prompt) :].tolist() == answer
