"""Engines of the tests: how they are asked, and what is read from their inside."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tidaldecode import TidalPlan

if TYPE_CHECKING:  # benchmarks/vllm_gpu_answers.py asks the same, and chooses first how vLLM is to run
    from vllm import LLM

LAYERS = 7
ABORTED = {4: 2, 40: 23, 90: 11}
"""Requests of `at_once` by the step after which they are aborted: while they are read, decode, or wait."""
CROSSING = {2: ["1:per_head:3", "1:per_head:2", "1:unified", "1:per_head:0"], 5: ["4:unified"] * 4}
"""Sources of the tiny Llama's plan that let heads read sets of the other of two ranks."""
ROLES = ("full", "select", "sparse", "sparse", "select", "sparse", "sparse")
CODED = ("full", "quantized_select", "sparse", "full", "quantized_select", "sparse", "quantized_select")
"""Roles with layers that choose by codes of keys."""


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


def tiny_plan(
    folder: Path,
    budget: int,
    selection: str,
    sources: dict[int, list[str]] | None = None,
    roles: tuple[str, ...] = ROLES,
) -> str:
    """Writes a plan for the tiny Llama, and returns its path."""
    plan = TidalPlan.validated(
        roles=roles,
        selection=selection,
        token_budget=budget,
        sink_tokens=2,
        recent_tokens=4,
        sources=sources,
        key_bits=2 if "quantized_select" in roles else None,
    )
    path = folder / f"plan-{budget}-{selection}-{bool(sources)}-{roles.count('quantized_select')}.json"
    plan.save(path)
    return str(path)


def with_plan(plan: str, budget: int | None = None) -> dict[str, Any]:
    """Options of an engine that decodes with a plan."""
    settings = {"plan": plan} | ({} if budget is None else {"token_budget": budget})
    return {"attention_backend": "CUSTOM", "additional_config": {"tidaldecode": settings}}


def greedy(engine: LLM, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of `new_tokens` tokens each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompts_of_all_lengths(longest: int, ids: range) -> list[list[int]]:
    """32 prompts of 100 to `longest` tokens, the short ones first; every fourth begins as the last one does."""
    random = np.random.default_rng(0)
    prompts = [random.integers(ids.start, ids.stop, int(n)).tolist() for n in np.geomspace(100, longest, 32)]
    for prompt in prompts[::4]:
        prompt[: len(prompt) // 2] = prompts[-1][: len(prompt) // 2]
    return prompts


def at_once(
    engine: LLM, prompts: list[list[int]], new_tokens: int, aborted: dict[int, int] = ABORTED
) -> tuple[dict[int, list[int]], int]:
    """Greedy answers to all prompts but the aborted ones, and how often a request was preempted."""
    from vllm import SamplingParams

    core, answers, steps = engine.llm_engine, {}, 0
    preemptions: dict[str, int] = {}
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    ids = [core.add_request(str(i), {"prompt_token_ids": prompt}, params) for i, prompt in enumerate(prompts)]
    scheduler = core.engine_core.engine_core.scheduler
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
        preemptions |= {name: request.num_preemptions for name, request in scheduler.requests.items()}
        if steps in aborted:
            core.abort_request([ids[aborted[steps]]], internal=True)
    return answers, sum(preemptions.values())


def stop(engine: LLM) -> None:
    """Ends an engine and frees its memory."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()


def attention_of(engine: LLM) -> Any:
    """The plan at work in an engine."""
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    return next(layer.impl.attention for layer in layers.values() if hasattr(layer, "impl"))
