"""The attention of a decode step on KV caches as vLLM lays them out, against PyTorch's SDPA on contiguous ones.

    python benchmarks/vllm_layout.py --output vllm_layout.json

Blocks are shuffled, and what decodes is what the vLLM backend calls: 32 layers, the paper's plan, one CUDA graph. SDPA
can't read blocks; it reads the same number of tokens from contiguous caches, which is the easier work. FlashInfer reads
vLLM's own blocks, where it is installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from tidaldecode import ModelShape, TidalPlan
from tidaldecode.bench.methods import sdpa
from tidaldecode.bench.roofline import read_bandwidth_gbs
from tidaldecode.bench.timing import Timing, time_gpu
from tidaldecode.ops import KV
from tidaldecode.results.environment import environment
from tidaldecode.serving.rank import Limits, RankAttention
from tidaldecode.vllm.cache_layout import row_views
from tidaldecode.whole_file import whole_file

LAYERS, HEADS, DIM = 32, 32, 128
STEPS = 2  # in a CUDA graph
LAYOUTS = ("token rows", "head rows")  # vLLM's orders of a block's tokens and heads
CASES = ((32, 1, 32768, 1024), (32, 1, 102400, 1024), (8, 1, 32768, 1024), (8, 1, 102400, 1024), (8, 32, 32768, 0.1))
"""KV heads, batch, context, budget."""


def _paged(kv_heads: int, batch: int, context: int, block_size: int, layout: str) -> tuple[Tensor, Tensor]:
    """A layer's cache, [num_blocks, Hkv, block_size, 2 · D], and a shuffled block table."""
    blocks = batch * context // block_size
    sizes = {"token rows": (block_size, kv_heads), "head rows": (kv_heads, block_size)}[layout]
    cache = torch.empty(blocks, *sizes, 2 * DIM, dtype=torch.bfloat16, device="cuda").normal_()
    table = torch.randperm(blocks, device="cuda").int().view(batch, -1)
    return (cache.transpose(1, 2) if layout == "token rows" else cache), table


def _time(attend: Callable[[int], object]) -> Timing:
    """Time of the attention of a step."""

    def step() -> None:
        for layer in range(LAYERS):
            attend(layer)

    return time_gpu([step] * STEPS, torch.device("cuda"))


def _sdpa(kv_heads: int, batch: int, context: int) -> Timing:
    caches = [
        torch.empty(2, batch, kv_heads, context, DIM, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3)
    ]
    query = torch.randn(batch, HEADS, DIM, device="cuda").bfloat16()
    return _time(lambda layer: sdpa(query, *caches[layer % 3], DIM**-0.5))


def _tidal(
    kv_heads: int, batch: int, context: int, budget: int | float, selection: str, block_size: int, layout: str
) -> Timing:
    shape = ModelShape(num_layers=LAYERS, num_query_heads=HEADS, num_kv_heads=kv_heads, head_dim=DIM)
    plan = TidalPlan.validated(**{**TidalPlan.paper(LAYERS, 13).model_dump(), "selection": selection})
    alone = SimpleNamespace(rank_in_group=0, world_size=1)
    attention = RankAttention(plan.with_budget(budget), shape, alone, Limits(context, batch, batch))
    caches = [_paged(kv_heads, batch, context, block_size, layout) for _ in range(3)]
    query = torch.randn(batch, HEADS, DIM, device="cuda").bfloat16()
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    attention.reserve(torch.device("cuda"))
    attention.begin(lengths)

    def attend(layer: int) -> Tensor:
        kv_cache, table = caches[layer % 3]
        return attention.attend(layer, query, KV(*row_views(kv_cache), table, lengths), DIM**-0.5)

    return _time(attend)


def _flashinfer(kv_heads: int, batch: int, context: int, block_size: int) -> Timing | None:
    """Full attention by FlashInfer over vLLM's blocks; `None` where it is not installed."""
    try:
        import flashinfer
    except ImportError:
        return None
    caches = [_paged(kv_heads, batch, context, block_size, "token rows") for _ in range(3)]
    pages = context // block_size
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**27, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=kv_heads < HEADS
    )
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages
    full = torch.full((batch,), block_size, dtype=torch.int32, device="cuda")
    wrapper.plan(starts, caches[0][1].flatten(), full, HEADS, kv_heads, DIM, block_size, q_data_type=torch.bfloat16)
    query = torch.randn(batch, HEADS, DIM, device="cuda").bfloat16()
    return _time(lambda layer: wrapper.run(query, row_views(caches[layer % 3][0])))


def _rows(block_sizes: list[int]) -> Iterator[dict[str, object]]:
    for kv_heads, batch, context, budget in CASES:
        case = {"kv_heads": kv_heads, "batch": batch, "context": context}
        full = _sdpa(kv_heads, batch, context)
        yield case | {"method": "sdpa, contiguous", "attention_ms": full.ms, "spread": full.spread}
        flash = _flashinfer(kv_heads, batch, context, 16)
        if flash is not None:
            yield case | {"method": "flashinfer", "block_size": 16, "attention_ms": flash.ms, "spread": flash.spread}
        for selection in ("per_head", "unified"):
            for layout, block_size in ((layout, size) for layout in LAYOUTS for size in block_sizes):
                torch.cuda.empty_cache()
                timing = _tidal(kv_heads, batch, context, budget, selection, block_size, layout)
                what = {"method": "tidal", "selection": selection, "budget": budget, "layout": layout}
                times = {"attention_ms": timing.ms, "spread": timing.spread, "speedup_vs_sdpa": full.ms / timing.ms}
                yield case | what | {"block_size": block_size} | times


def main() -> None:
    """Measures, prints a line for each row, and writes the JSON file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--block-sizes", default="16,64")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda")
    result = {
        **environment(device),
        "kind": "vllm_layout",
        "read_bandwidth_gbs": read_bandwidth_gbs(device),
        "layers": LAYERS,
        "heads": HEADS,
        "head_dim": DIM,
        "rows": [],
    }
    for row in _rows([int(size) for size in arguments.block_sizes.split(",")]):
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        with whole_file(arguments.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
