"""How far a captured verification pass lets the memory of a GPU grow.

    python benchmarks/chunk_memory.py --output benchmarks/results/chunk_memory_llama-2-7b_h100.json

`compiled` is the first pass of its length in the process, which is compiled too; `captured` the first of another cache,
compiled before; `replayed` every later one. `peak_mib` is how far allocated memory rises meanwhile, `kept_mib` how much
more is allocated afterwards. Before each the cache's decode step was captured. Random weights, K and V.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import torch

from tidaldecode.bench.shapes import RandomModel
from tidaldecode.hf import TidalCache, apply
from tidaldecode.hf.second_pass import full_pass
from tidaldecode.plans.find import find_plan
from tidaldecode.results.environment import environment
from tidaldecode.whole_file import whole_file


def main() -> None:
    """Prints a line for each measurement, and writes one JSON object."""
    options = parse()
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = apply(RandomModel(options.config).model(device, torch.bfloat16), "paper")
    rows = []
    cache = stepped(model, options.context, max(options.lengths))
    for state in ("compiled", "replayed"):
        rows += [measured(model, cache, state, length) for length in options.lengths]
    del cache
    cache = stepped(model, options.context, max(options.lengths))
    rows += [measured(model, cache, "captured", length) for length in options.lengths]
    report = {**environment(device), "model": options.config, "dtype": "bfloat16", "context": options.context}
    with whole_file(options.output) as temporary:
        temporary.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="llama-2-7b")
    parser.add_argument("--context", type=int, default=16_384)
    parser.add_argument("--lengths", type=lambda text: [int(item) for item in text.split(",")], default=[8, 16])
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def stepped(model, context, longest):
    """A cache of random K and V whose decode step is captured."""
    plan = find_plan("paper", model.config).with_budget(1024)
    cache = TidalCache(model.config, plan, context + longest + 2)
    cache.fill(1, context, model.device, torch.bfloat16, torch.Generator(model.device).manual_seed(0))
    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache)
    return cache


def measured(model, cache, state, length):
    """The row of one verification pass of `length` drafted tokens."""
    before, lengths = cache.get_seq_length(), cache.sequences.lengths.clone()
    ids = torch.randint(model.config.vocab_size, (1, length + 1), device=model.device)
    positions = lengths[:, None].long() + torch.arange(length + 1, device=model.device)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    full_pass(model, cache, ids, positions)
    torch.cuda.synchronize()
    peak, kept = torch.cuda.max_memory_allocated() - allocated, torch.cuda.memory_allocated() - allocated
    cache.rewind(before, lengths)
    row = {"drafted": length, "pass": state, "captured": length + 1 in cache.session.graphs}
    row |= {"peak_mib": round(peak / 2**20, 2), "kept_mib": round(kept / 2**20, 2)}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    main()
