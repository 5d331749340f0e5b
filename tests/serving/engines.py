"""Engines of the tests: how they are asked, and what is read from their inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm import LLM, SamplingParams

from tidaldecode import TidalPlan

LAYERS = 7
ROLES = ("full", "select", "sparse", "sparse", "select", "sparse", "sparse")


def save_tiny_llama(folder: Path) -> Path:
    """Writes the weights and configuration of a tiny Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def tiny_plan(folder: Path, budget: int, selection: str, sources: dict[int, list[str]] | None = None) -> str:
    """Writes a plan for the tiny Llama, and returns its path."""
    plan = TidalPlan.validated(
        roles=ROLES, selection=selection, token_budget=budget, sink_tokens=2, recent_tokens=4, sources=sources
    )
    path = folder / f"plan-{budget}-{selection}-{bool(sources)}.json"
    plan.save(path)
    return str(path)


def with_plan(plan: str, budget: int | None = None) -> dict[str, Any]:
    """Options of an engine that decodes with a plan."""
    settings = {"plan": plan} | ({} if budget is None else {"token_budget": budget})
    return {"attention_backend": "CUSTOM", "additional_config": {"tidaldecode": settings}}


def greedy(engine: LLM, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of `new_tokens` tokens each."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def attention_of(engine: LLM) -> Any:
    """The plan at work in an engine."""
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    return next(iter(layers.values())).impl.attention
