"""How long calls take: medians by CUDA events, of many calls in one CUDA graph; by the clock on a CPU."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tidaldecode.bench.hardware import l2_bytes

Call = Callable[[], object]

_SECONDS = {"cuda": 0.3, "cpu": 0.05}  # to spend on replays, where the fewest take no longer
_FEWEST_REPLAYS, _MOST_REPLAYS = 10, 200


@dataclass(frozen=True)
class Timing:
    """Time of one call.

    Attributes:
        ms: median milliseconds.
        spread: interquartile range over the median.
    """

    ms: float
    spread: float

    @property
    def us(self) -> float:
        """Median microseconds."""
        return self.ms * 1000

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """From at least two samples, in milliseconds."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (high - low) / median if median else 0.0)


def rotated_buffers(bytes_per_call: float, device: torch.device, most: int = 64) -> int:
    """How many calls, each on a buffer of its own, leave the L2 cache nothing to keep: three times its size, or 2."""
    return min(most, max(2, math.ceil(3 * l2_bytes(device) / bytes_per_call)))


def time_gpu(calls: Sequence[Call], device: torch.device, *, captured: bool = True) -> Timing:
    """Time of one of several like calls, each of which should work on another buffer (`rotated_buffers`).

    On a GPU all of them are captured in one CUDA graph, and its replays timed by CUDA events: give so many that the
    graph's own launch, a few microseconds, does not count. On a CPU they run one after the other.

    Args:
        calls: called without arguments, in order.
        device: where they work.
        captured: `False` for calls that a CUDA graph can't hold; their launches count too.
    """

    def run_all() -> None:
        for call in calls:
            call()

    replay = _capture(run_all, device) if device.type == "cuda" and captured else run_all
    once = _samples(replay, 2, device)[-1]  # the first one warms up
    replays = min(_MOST_REPLAYS, max(_FEWEST_REPLAYS, int(_SECONDS[device.type] * 1000 / max(once, 1e-6))))
    timing = Timing.of(_samples(replay, replays, device))
    return Timing(timing.ms / len(calls), timing.spread)


def time_steps(step: Call, device: torch.device, warm_up: int, steps: int, repeats: int = 2) -> Timing:
    """Time of a step that is a CUDA graph already, or none: each run timed by itself.

    Args:
        warm_up: steps before each repeat that do not count.
        steps: steps of each repeat that do.
    """
    samples = []
    for _ in range(repeats):
        samples += _samples(step, warm_up + steps, device)[warm_up:]
    return Timing.of(samples)


def _capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The calls as a CUDA graph, after a run on the stream of the capture, where kernels find their scratch memory."""
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _samples(run: Call, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` runs."""
    if device.type != "cuda":
        return [_clock(run) for _ in range(count)]
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    marks = [(event(), event()) for _ in range(count)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in marks]


def _clock(run: Call) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000
