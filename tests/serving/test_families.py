"""Other models than Llama: their answers are those of the Transformers wing, and layers with windows keep them."""

from __future__ import annotations

import pytest
import torch
from engines import attention_of, greedy, with_plan
from transformers import AutoModelForCausalLM

import tidaldecode
from families import FAMILIES, plan_for

SIZES = {"head_dim": 32, "hidden_size": 128, "query_pre_attn_scalar": 32}


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("gemma3_text", {}),
        ("gemma3_text", {"disable_hybrid_kv_cache_manager": True}),
        ("qwen3", {}),
    ],
    ids=["windows", "windows in one group", "qwen3"],
)
def test_answers_are_those_of_transformers(start, tmp_path, byte_tokenizer, family, engine):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**SIZES)).float().eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    plan = plan_for(model.config, token_budget=24)
    plan.save(tmp_path / "plan.json")
    options = with_plan(str(tmp_path / "plan.json")) | {"max_model_len": 512, "max_num_batched_tokens": 64}
    llm = start(tmp_path, **options, **engine)
    prompts = [torch.randint(2, 258, (length,)).tolist() for length in (50, 131, 400)]
    answers = greedy(llm, prompts, 16)
    assert attention_of(llm).read_counts.fraction < 0.8
    tidaldecode.apply(model, plan)
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.tensor([prompt])
        output = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert output[0, len(prompt) :].tolist() == answer
