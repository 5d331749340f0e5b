"""Draft step, verification pass and full step of one model shape, in one run: what a round of lossless decoding costs.

Drafts go by the plan's layers, and out of verification by what its passes chose, whose choice costs something too.

    python benchmarks/lossless_step.py --output benchmarks/results/lossless_step_llama-2-7b_h100.json

Random weights, and random K and V: times do not depend on them, but nothing is accepted either. So tokens per round are
not measured here; `projected_speedup` takes them from `--accepted` and `--accepted-verification` (by T), as measured on
a real model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from tidaldecode.bench.hardware import measuring
from tidaldecode.bench.shapes import RandomModel
from tidaldecode.bench.timing import time_steps
from tidaldecode.hf import TidalCache, apply
from tidaldecode.hf.second_pass import full_pass
from tidaldecode.plans.find import find_plan
from tidaldecode.results.environment import environment
from tidaldecode.whole_file import whole_file

WARM_UP, STEPS, REPEATS = 5, 50, 2


def main() -> None:
    """Prints a table, and writes one JSON object."""
    options = parse()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    with measuring(device, "lower --context"):
        model = apply(RandomModel(options.config).model(device, dtype), options.plan)
        full, plan = find_plan("full", model.config), find_plan(options.plan, model.config).with_budget(options.budget)
        room = max(options.lengths) + 1
        cache = TidalCache(model.config, full, options.context + room)
        fill(cache, model, options.context)
        steps = {"full": step_time(model, cache)}
        rows, captured = [], True
        for drafting, accepted in (("plan", options.accepted), ("verification", options.accepted_verification)):
            cache.use_plan(plan.with_drafting(drafting))
            drafts = cache.for_drafts(max(options.lengths))
            choose(model, drafts)
            steps[drafting] = step_time(model, drafts)
            captured = captured and drafts.session.step is not None
            rows += [verification(model, drafts, drafting, length, steps, accepted) for length in options.lengths]
    report = {
        **environment(device),
        "model": options.config,
        "dtype": options.dtype,
        "plan": options.plan,
        "budget": options.budget,
        "context": options.context,
        "captured": captured,
        "full_step_ms": steps["full"],
        "draft_step_ms": steps["plan"],
        "verified_draft_step_ms": steps["verification"],
        "rows": rows,
    }
    print(table(report), file=sys.stderr)
    if options.output is None:
        print(json.dumps(report, indent=1))
        return
    with whole_file(options.output) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="llama-2-7b")
    parser.add_argument("--context", type=int, default=102_400)
    parser.add_argument("--plan", default="paper")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--lengths", type=lambda text: [int(item) for item in text.split(",")], default=[8, 16])

    def by_length(text: str) -> dict[int, float]:
        return {int(item.split(":")[0]): float(item.split(":")[1]) for item in text.split(",")}

    for option in ("--accepted", "--accepted-verification"):
        told = "tokens out per round, measured elsewhere: T:tokens,T:tokens"
        parser.add_argument(option, type=by_length, default={}, help=told)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def fill(cache, model, context):
    """Random K and V of `context` tokens."""
    generator = torch.Generator(model.device).manual_seed(0)
    cache.fill(1, context, model.device, model.dtype, generator)


def choose(model, drafts):
    """One verification pass, over one token that is forgotten again: what drafts out of verification begin with."""
    before, lengths = drafts.get_seq_length(), drafts.sequences.lengths.clone()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    full_pass(model, drafts, token, lengths[:, None].long(), capture=False)
    drafts.rewind(before, lengths)


def step_time(model, cache):
    """Median milliseconds of a decode step, the same one each time."""
    before, lengths = cache.get_seq_length(), cache.sequences.lengths.clone()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    def decode():
        nonlocal token
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        cache.rewind(before, lengths)

    return round(time_steps(decode, model.device, WARM_UP, STEPS, REPEATS).ms, 4)


def verification(model, cache, drafting, length, steps, accepted):
    """The row of one draft length: its pass over `length` + 1 tokens, and what a round costs with it."""
    ids = torch.randint(model.config.vocab_size, (1, length + 1), device=model.device)
    before, lengths = cache.get_seq_length(), cache.sequences.lengths.clone()
    positions = lengths[:, None].long() + torch.arange(length + 1, device=model.device)
    memory = Memory(model.device)

    def verify():
        full_pass(model, cache, ids, positions).argmax(-1)
        cache.rewind(before, lengths)

    verify()
    growth = memory.growth()
    ms = time_steps(verify, model.device, WARM_UP, STEPS, REPEATS).ms
    round_ms = length * steps[drafting] + ms
    row = {
        "drafting": drafting,
        "drafted": length,
        "captured": length + 1 in cache.session.graphs,
        "verification_ms": round(ms, 4),
        "verification_over_full_step": round(ms / steps["full"], 4),
        "round_ms": round(round_ms, 4),
        "tokens_per_round_to_break_even": round(round_ms / steps["full"], 4),
        "peak_memory_growth_mib": growth,
    }
    if length in accepted:
        row["accepted_per_round"] = accepted[length]
        row["projected_speedup"] = round(accepted[length] * steps["full"] / round_ms, 4)
    return row


class Memory:
    """How far the peak of allocated memory rises from here on."""

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def growth(self):
        """In MiB; `None` where it is not counted."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        return round((torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20, 1)


def table(report):
    """The report in a few lines."""
    lines = [
        f"{report['model']}, {report['context']:,} tokens, {report['plan']} with {report['budget']}, {report['dtype']}",
        f"full step {report['full_step_ms']:.3f} ms, draft step {report['draft_step_ms']:.3f} ms by the plan,"
        f" {report['verified_draft_step_ms']:.3f} ms out of verification",
        "  drafting        T  captured  verification ms  over full step  round ms  break-even  speed-up",
    ]
    for row in report["rows"]:
        lines.append(
            f"  {row['drafting']:<12}  {row['drafted']:>3}  {row['captured']!s:>8}  {row['verification_ms']:>15.3f}"
            f"  {row['verification_over_full_step']:>14.3f}  {row['round_ms']:>8.2f}"
            f"  {row['tokens_per_round_to_break_even']:>10.2f}  {row.get('projected_speedup', '-'):>8}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
