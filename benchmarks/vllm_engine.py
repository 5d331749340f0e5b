"""An engine of vLLM's that is asked for answers, and observed: what each step ran, and when each token came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


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


class Engine:
    """An engine that is asked and observed.

    Args:
        settings: as for vLLM's `LLM`.
        prepare: changes the model's weights.
    """

    def __init__(self, settings: dict[str, Any], prepare: Callable[[torch.nn.Module], None] | None = None) -> None:
        from vllm import LLM

        start = time.perf_counter()
        self.llm = LLM(**settings)
        if prepare is not None:
            self.llm.apply_model(prepare)
        self.start_s = time.perf_counter() - start
        self.observer = Observer(self.llm.llm_engine.engine_core.engine_core.scheduler)
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self._asked: dict[str, Asked] = {}
        self._running = 0

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

    def ask(
        self,
        prompts: list[list[int]],
        new_tokens: int,
        at_once: int | None = None,
        late: tuple[list[int], ...] = (),
    ) -> list[Asked]:
        """Asks for answers of `new_tokens` tokens each, and waits for all.

        Args:
            prompts: of the requests.
            new_tokens: of each.
            at_once: how many requests run at once. Default: all.
            late: more prompts, each for one token: they are asked one after another once all others decode.
        """
        waiting, last = list(reversed(prompts)), list(reversed(late))
        asked: list[Asked] = []
        while waiting or last or self._running:
            while waiting and (at_once is None or self._running < at_once):
                asked.append(self._add(waiting.pop(), new_tokens))
            self._step()
            if last and sum(request.tokens > 2 for request in asked) >= len(prompts):
                asked.append(self._add(last.pop(), 1))
        return asked

    def _add(self, prompt: list[int], new_tokens: int) -> Asked:
        from vllm import SamplingParams

        name = f"asked-{len(self._asked)}"
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        self._asked[name] = Asked(time.perf_counter())
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self._running += 1
        return self._asked[name]

    def _step(self) -> None:
        for output in self.llm.llm_engine.step():
            request, now = self._asked[output.request_id], time.perf_counter()
            request.tokens = len(output.outputs[0].token_ids)
            request.first, request.last = request.first or now, now
            request.cached = output.num_cached_tokens or 0
            self._running -= output.finished

    def forget(self) -> None:
        """Empties the prefix cache."""
        assert self.llm.reset_prefix_cache()


def summary(times: list[float]) -> dict[str, Any]:
    """Median and spread of times in milliseconds."""
    if not times:
        return {"ms": None, "steps": 0}
    low, middle, high = np.percentile(times, (10, 50, 90))
    return {"ms": float(middle), "p10": float(low), "p90": float(high), "longest": max(times), "steps": len(times)}


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
