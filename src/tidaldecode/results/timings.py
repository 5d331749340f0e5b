"""The rows of `bench ops` and `bench decode`; what nothing is drawn from may be missing."""

from __future__ import annotations

from tidaldecode.results.rows import Budget, Name, Number, Positive, Row, Time


class OperationRow(Row):
    """One operation at one shape.

    Attributes:
        operation: `sdpa` is torch's scaled_dot_product_attention; `select` is `importance` and `selection` together;
            `quantized_select` is `choice`, by codes of so many bits, and attention to what it chose; `quest` is a layer
            of Quest; `step ...` is the attention of a whole decode step.
        context: tokens of each sequence.
        us: median microseconds.
        spread: interquartile range over the median.
        floor_us: microseconds in which the bytes that must be read can be read.
        over_sdpa: time over that of `sdpa` for an operation, of `step full (sdpa)` for a step.
        speedup_vs_full: of a step, the time of `step full (sdpa)` over its own.
        caches: distinct layer caches that the calls went through.
        captured: whether the calls ran in a CUDA graph.
    """

    operation: Name
    heads: Positive
    kv_heads: Positive
    head_dim: Positive | None = None
    batch: Positive
    context: Positive
    budget: Budget
    us: Time
    spread: Number | None = None
    floor_us: Number
    over_sdpa: Number | None
    speedup_vs_full: Number | None
    caches: Positive | None = None
    captured: bool | None = None


class DecodeRow(Row):
    """Decode steps by one method.

    Attributes:
        context: tokens of each sequence in the cache before the first step.
        step_ms: median milliseconds from a token to the next, embedding and argmax included.
        spread: interquartile range over the median.
        floor_ms: milliseconds in which the weights, and the K and V that the method needs, can be read.
        over_floor: time over the floor.
        speedup_vs_full: time of the faster full attention, `full` or `sdpa`, over the method's; `None` where neither
            was measured.
        kv_read_fraction: share of the KV cache that the method reads.
        kv: whose K and V the cache held, `text` or `random`.
        captured: whether the step ran in a CUDA graph.
    """

    method: Name
    context: Positive
    budget: Budget
    step_ms: Time
    spread: Number | None = None
    floor_ms: Number
    over_floor: Number | None = None
    speedup_vs_full: Number | None
    kv_read_fraction: Number
    kv: Name | None = None
    captured: bool | None = None
