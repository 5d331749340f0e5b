"""vLLM with TidalDecode and without, one engine after the other: decode steps, mixed steps, documents, chats.

    python benchmarks/vllm_serve.py --output vllm_serve.json
    python benchmarks/vllm_serve.py --rows decode,mixed --engines vllm,tidaldecode --output vllm_serve.json
    python benchmarks/vllm_serve.py --rows decode --tensor-parallel-size 2 --output vllm_serve_2_gpus.json
    python benchmarks/vllm_serve.py --small --output small.json      # on a CPU, to try the script itself

A model of Llama-3-8B's shape with random weights (or `--model`), prompts of random tokens, the paper's layers with
unified selection. Each engine runs in a process of its own, through vLLM's `LLMEngine`: its scheduler, prefix cache and
CUDA graphs are those of `vllm serve`, without HTTP. What it is asked are rows, and each is in the result as soon as it
is measured, so that a run that is cut off loses one row. A step's time is that between the outputs of two steps on the
host, while requests are there all the time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm_engine import Compilations, Engine, served, summary
from vllm_processes import rows_of, tell

from tidaldecode import TidalPlan
from tidaldecode.bench.shapes import RandomModel
from tidaldecode.results.environment import environment
from tidaldecode.results.rows import save_results

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `spread_scores`, where ranks are processes


@dataclass(frozen=True)
class Sizes:
    """How much is asked, in tokens but for numbers of requests.

    Attributes:
        document: of each of `documents` prompts that share the KV cache.
        step: what a document is filled up to before steps of decoding are timed.
        question, answer: of each of `questions` requests about documents that are cached.
        long: the prompt that is alone.
        chat, chat_answer: of each of `chats`.
        middle: of each of the `chats` requests whose step is timed at two values of --max-model-len.
        chunk: tokens of a step.
        steps: of decoding that are timed.
        first: new tokens of each document's request, whose time is measured.
    """

    document: int = 32000
    documents: int = 12
    step: int = 32704
    question: int = 64
    answer: int = 256
    questions: int = 24
    long: int = 102400
    chat: int = 500
    chat_answer: int = 200
    middle: int = 2048
    chats: int = 64
    chunk: int = 8192
    steps: int = 48
    first: int = 64
    context: int = 131072
    short_context: int = 4096
    budget: int = 1024


SMALL = Sizes(
    document=320,
    documents=3,
    step=360,
    question=16,
    answer=8,
    questions=6,
    long=800,
    chat=30,
    chat_answer=8,
    middle=100,
    chats=4,
    chunk=128,
    steps=6,
    first=4,
    context=1024,
    short_context=256,
    budget=64,
)


def plan_of(layers: int, budget: int) -> TidalPlan:
    """The paper's layers, with one set for all heads."""
    return TidalPlan.paper(layers, token_budget=budget).model_copy(update={"selection": "unified", "name": "unified"})


def model_folder(folder: Path, shape: str) -> Path:
    """A folder with the configuration of a public shape, for random weights."""
    config = RandomModel(shape).config()
    config.architectures = ["LlamaForCausalLM"]
    if shape == "tiny":
        config.head_dim = 32  # the least that vLLM's attention has on a CPU
    config.save_pretrained(folder)
    return folder


def spread_scores(model: torch.nn.Module) -> None:
    """Gives random weights a spread: vLLM's are so small that all scores are equal, which no model's are.

    Scores of about unit variance, as of normal queries and keys, and hidden states that neither vanish nor grow.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.data.fill_(1.0)
        elif weight.ndim == 2:
            scale = weight.shape[1] ** -0.5 if "embed" not in name else 1.0
            flat = weight.data.view(-1)
            block = torch.randn(2**20, generator=generator).to(weight.device, weight.dtype) * scale
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                part.copy_(block.roll(start % 8191)[: part.numel()])


def start(options: argparse.Namespace, sizes: Sizes) -> Engine:
    """The engine that the options ask for."""
    folder = Path(options.model) if options.model else model_folder(Path(tempfile.mkdtemp()), options.shape)
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy" if options.model is None else "auto",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16" if on_gpu else "float32",
        "max_model_len": options.context,
        "max_num_seqs": max(sizes.chats, sizes.documents),
        "max_num_batched_tokens": sizes.chunk,
        "enable_prefix_caching": True,
        "tensor_parallel_size": options.tensor_parallel_size,
        "seed": 0,
    }
    if on_gpu:
        settings["gpu_memory_utilization"] = options.gpu_memory_utilization
        settings["compilation_config"] = json.loads(options.compilation_config)
    else:
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
    if options.engine == "tidaldecode":
        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        plan = Path(tempfile.mkdtemp()) / "plan.json"
        plan_of(layers, sizes.budget).save(plan)
        given = {"plan": options.plan or str(plan), "token_budget": sizes.budget}
        settings |= {"attention_backend": "CUSTOM", "additional_config": {"tidaldecode": given}}
    return Engine(settings, None if options.model or options.flat else spread_scores)


class Rows:
    """What an engine is asked; each row is a method, and what the rows before left in the prefix cache is used."""

    def __init__(self, engine: Engine, sizes: Sizes) -> None:
        self.engine, self.sizes = engine, sizes
        self.documents = [engine.tokens(sizes.document, seed) for seed in range(sizes.documents)]

    def warm_up(self) -> dict[str, Any]:
        """Requests that begin one after another, longer than the budget: whatever is compiled late is compiled here."""
        prompts = [self.engine.tokens(self.sizes.budget + 40 * i, 900 + i) for i in range(self.sizes.documents)]
        return served(self.engine.ask(prompts, self.sizes.documents + 4, self.sizes.documents))

    def batch(self) -> dict[str, Any]:
        """All documents at once, read anew: the time for `first` new tokens less the time for one, by token."""
        times = {}
        for new_tokens in (1, self.sizes.first):
            self.engine.forget()
            since = len(self.engine.observer.steps)
            requests = self.engine.ask(self.documents, new_tokens)
            times[new_tokens] = served(requests)
        steps = self.engine.observer.steps[since:]
        mixed = [step for step in steps if step.prompt_tokens]
        one, many = times[1]["seconds"], times[self.sizes.first]["seconds"]
        return {
            "ms_per_token": 1e3 * (many - one) / (self.sizes.first - 1),
            "seconds_one": one,
            "seconds_many": many,
            "steps_with_prompts": len(mixed),
            "many": times[self.sizes.first],
        }

    def decode(self) -> dict[str, Any]:
        """A step of all documents' requests."""
        return self._steps([self._filled(i) for i in range(self.sizes.documents)])

    def decode_one(self) -> dict[str, Any]:
        """A step of one request of `step` tokens."""
        return self._steps([self._filled(0)])

    def _filled(self, index: int) -> list[int]:
        return self.documents[index] + self.engine.tokens(self.sizes.step - self.sizes.document, 100 + index)

    def _steps(self, prompts: list[list[int]]) -> dict[str, Any]:
        since = len(self.engine.observer.steps)
        requests = self.engine.ask(prompts, self.sizes.steps + len(prompts))
        times = self.engine.observer.times_ms(len(prompts), 0, 0, since)
        return {"batch": len(prompts), "context": len(prompts[0])} | summary(times) | {"served": served(requests)}

    def questions(self) -> dict[str, Any]:
        """Questions about documents that are in the prefix cache, as many at once as there are documents."""
        sizes = self.sizes
        prompts = [
            self.documents[i % sizes.documents] + self.engine.tokens(sizes.question, 200 + i)
            for i in range(sizes.questions)
        ]
        return served(self.engine.ask(prompts, sizes.answer, sizes.documents))

    def mixed(self) -> dict[str, Any]:
        """A step with a chunk of a prompt, while all documents' requests but one decode."""
        sizes, observer = self.sizes, self.engine.observer
        decoding = sizes.documents - 1
        long = self.documents[:decoding]
        # two prompts, of which all but the last chunk fill the step
        late = [self.engine.tokens(sizes.document, 300 + i) for i in range(2)]
        chunks = sum(-(-len(prompt) // (sizes.chunk - decoding)) for prompt in late)
        since = len(observer.steps)
        requests = self.engine.ask(long, decoding + 2 * chunks + 8, late=tuple(late))
        times = observer.times_ms(decoding, sizes.chunk - decoding - 16, sizes.chunk, since)
        alone = observer.times_ms(decoding, 0, 0, since)
        return (
            {"decoding": decoding, "chunk": sizes.chunk - decoding}
            | summary(times)
            | {
                "times": times,
                "decoding_alone": summary(alone),
                "served": served(requests),
            }
        )

    def chats(self) -> dict[str, Any]:
        """Short conversations, all at once."""
        sizes = self.sizes
        prompts = [self.engine.tokens(sizes.chat, 400 + i) for i in range(sizes.chats)]
        since = len(self.engine.observer.steps)
        result = served(self.engine.ask(prompts, sizes.chat_answer))
        return result | {"step": summary(self.engine.observer.times_ms(sizes.chats, 0, 0, since))}

    def middle(self) -> dict[str, Any]:
        """A step of requests of some thousand tokens."""
        return self._steps([self.engine.tokens(self.sizes.middle, 500 + i) for i in range(self.sizes.chats)])

    def decode_long(self) -> dict[str, Any]:
        """A step of one long request."""
        return self._steps([self.engine.tokens(self.sizes.long, 600)])


ORDER = ("batch", "decode", "questions", "mixed", "decode_one", "chats", "middle", "decode_long")
"""All rows, in an order in which documents are read as seldom as possible."""

AT_BOTH_LENGTHS = ("middle",)
"""Rows that TidalDecode's engine also answers at `short_context`."""


def measure(options: argparse.Namespace, sizes: Sizes) -> None:
    """One engine: a line of JSON on stdout for each row, behind `ROW `."""
    compilations = Compilations()
    engine = start(options, sizes)
    rows = Rows(engine, sizes)
    common = {
        "engine": options.engine,
        "max_model_len": options.context,
        "tensor_parallel": options.tensor_parallel_size,
    }
    tell(**common, row="engine", **engine.facts, compiled=compilations.take())
    for name in (*(() if options.cold else ("warm_up",)), *options.rows.split(",")):
        started = time.perf_counter()
        try:
            result = getattr(rows, name)()
        except Exception as error:  # the other rows are still worth their time
            result = {"error": f"{type(error).__name__}: {error}"}
        tell(**common, row=name, **result, compiled=compilations.take(), row_s=time.perf_counter() - started)
    if options.profile and options.context == sizes.context:
        profile(rows, options)


def profile(rows: Rows, options: argparse.Namespace) -> None:
    """Runs a row under PyTorch's profiler; its tables and its trace lie beside the result."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profiler(activities=activities) as profiled:
        getattr(rows, options.profile)()
    beside = options.output.with_suffix(f".{options.engine}.{options.profile}")
    averages = profiled.key_averages()
    keys = ["self_cpu_time_total", *(["self_cuda_time_total"] if torch.cuda.is_available() else [])]
    tables = [averages.table(sort_by=key, row_limit=40, max_name_column_width=80) for key in keys]
    beside.with_name(beside.name + ".txt").write_text("\n".join(tables))
    profiled.export_chrome_trace(str(beside.with_name(beside.name + ".trace.json.gz")))


# ---- the run


def engines(options: argparse.Namespace, sizes: Sizes) -> Iterator[tuple[str, int, list[str]]]:
    """Each engine that is started: its name, its --max-model-len, and its rows."""
    rows = [row for row in ORDER if row in options.rows.split(",")]
    for engine in options.engines.split(","):
        yield engine, sizes.context, rows
    both = [row for row in rows if row in AT_BOTH_LENGTHS]
    if both and "tidaldecode" in options.engines.split(","):
        yield "tidaldecode", sizes.short_context, both


def ratios(rows: list[dict[str, Any]], sizes: Sizes) -> dict[str, float]:
    """How many times the one engine's number is the other's; each name says which way round."""
    found = {(row["row"], row["engine"], row["max_model_len"]): row for row in rows if "error" not in row}

    def value(row: str, engine: str, key: str, context: int = sizes.context) -> float | None:
        return found.get((row, engine, context), {}).get(key)

    result = {}
    for row, key, what, faster_is_less in (
        ("decode", "ms", "decode step: vLLM over TidalDecode", True),
        ("decode_one", "ms", "decode step of one: vLLM over TidalDecode", True),
        ("decode_long", "ms", "decode step, long: vLLM over TidalDecode", True),
        ("mixed", "ms", "mixed step: TidalDecode over vLLM", False),
        ("batch", "ms_per_token", "batch by token: vLLM over TidalDecode", True),
        ("questions", "output_tokens_per_s", "questions, tokens per second: TidalDecode over vLLM", False),
        ("chats", "output_tokens_per_s", "chats, tokens per second: TidalDecode over vLLM", False),
        ("middle", "ms", "middle step: TidalDecode over vLLM", False),
    ):
        own, other = value(row, "tidaldecode", key), value(row, "vllm", key)
        if own and other:
            result[what] = other / own if faster_is_less else own / other
    long, short = value("middle", "tidaldecode", "ms"), value("middle", "tidaldecode", "ms", sizes.short_context)
    if long and short:
        result[f"middle step: --max-model-len {sizes.context} over {sizes.short_context}"] = long / short
    return result


def run(options: argparse.Namespace, sizes: Sizes) -> None:
    """All engines, one process each; the file is written after each row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {**environment(device), "kind": "vllm_serve", "shape": options.model or options.shape}
    result |= {"sizes": vars(sizes), "rows": [], "ratios": {}}
    for engine, context, rows in engines(options, sizes):
        for row in rows_of(engine, "--context", str(context), "--rows", ",".join(rows)):
            result["rows"].append(row)
            result["ratios"] = ratios(result["rows"], sizes)
            save_results(result, options.output)
    print(json.dumps(result["ratios"], indent=1))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ORDER), help=f"some of {', '.join(ORDER)}")
    parser.add_argument("--engines", default="vllm,tidaldecode")
    parser.add_argument("--shape", default=None, help="a public model's shape; default: llama-3-8b")
    parser.add_argument("--model", help="a folder with a model, instead of random weights")
    parser.add_argument("--plan", help="a plan file; default: the paper's layers, unified")
    parser.add_argument(
        "--size", action="append", default=[], metavar="NAME=N", help=f"one of {', '.join(vars(SMALL))}"
    )
    parser.add_argument("--profile", metavar="ROW", help="runs a row once more, last, under PyTorch's profiler")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.94)
    parser.add_argument("--compilation-config", default="{}", help="vLLM's; default: vLLM's own")
    parser.add_argument(
        "--flat", action="store_true", help="vLLM's random weights as they are: all scores nearly equal"
    )
    parser.add_argument("--cold", action="store_true", help="no warm-up before the first row")
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens, to try the script")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shape = options.shape or ("tiny" if options.small else "llama-3-8b")
    unknown = set(options.rows.split(",")) - set(ORDER)
    if unknown:
        parser.error(f"no rows {', '.join(sorted(unknown))}: there are {', '.join(ORDER)}")
    sizes = SMALL if options.small else Sizes()
    sizes = replace(sizes, **{name: int(value) for name, value in (size.split("=") for size in options.size)})
    if options.engine is None:
        run(options, sizes)
    else:
        measure(options, sizes)


if __name__ == "__main__":
    main()
