"""How much of a plan's gap comes from drifted K and V, and how much of that cache correction closes.

    python benchmarks/drift.py --windows 18 --stride 8192 --output drift.json

Real text is decoded, teacher-forced, by the model's own decode steps, all windows side by side. With a correction after
every token (T = 1) the K and V of all earlier tokens are full attention's, so the gap that is left comes from reading
few tokens, and the gap without correction less that one is the drift's. `share_closed` is the part of it that
correction every T tokens closes, over all windows, and `share_closed_95` where 95 % of windows drawn anew have it.
`by_phase` is the gap of the first token behind a correction, of the second, and so on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

import torch

import tidaldecode
from tidaldecode.hf import TidalCache
from tidaldecode.hf.second_pass import Correction
from tidaldecode.models import find_model
from tidaldecode.plans.find import find_plan
from tidaldecode.results.environment import environment
from tidaldecode.texts.text import Text, paul_graham_essays, text_parts
from tidaldecode.texts.windows import Windows
from tidaldecode.whole_file import whole_file

BOOTSTRAP = 10_000


def main() -> None:
    """Prints a line for each plan, budget and T, and writes one JSON object."""
    options = parse()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    files = find_model("smollm2-135m")
    parts = iter([paul_graham_essays()]) if options.text is None else text_parts(options.text)
    text = Text.tokenize(files.tokenizer(), parts)
    settings = Windows(options.context, options.decode, options.windows, options.offset, options.stride)
    settings.check_text(text)
    windows = torch.cat([text.window(start, options.context) for start in settings.starts]).to(device)
    model = tidaldecode.apply(files.model(device, dtype), "full")
    cache = read(model, windows, options.decode)
    full = losses(model, cache, windows, options.decode, "full", None, None)
    rows = []
    for plan, budget in product(options.plans, options.budgets):
        gaps = {}
        for interval in (None, *options.lengths):
            began = time.perf_counter()
            gaps[interval] = losses(model, cache, windows, options.decode, plan, budget, interval) - full
            rows.append(row(plan, budget, interval, gaps))
            seconds = time.perf_counter() - began
            print(
                json.dumps({**rows[-1], "per_window": None, "by_phase": None}),
                f"{seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            write(rows, device, options, settings)  # a run that is stopped keeps what it has


def parse() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="default: Paul Graham's essays")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--decode", type=int, default=2000)
    parser.add_argument("--windows", type=int, default=18)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--stride", type=int, default=8192)
    parser.add_argument("--plans", type=lambda text: text.split(","), default=["smollm2-135m"])
    parser.add_argument("--budgets", type=numbers, default=[64, 256])
    parser.add_argument("--lengths", type=numbers, default=[1, 16], help="T; 1, which is what drift is told by, first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def read(model, windows, decode):
    """A cache that holds the prompts of all windows, as `evaluate.prompt.read_prompt` leaves it for one."""
    cache = TidalCache(model.config, find_plan("full", model.config), windows.shape[1])
    with torch.no_grad():
        model(windows[:, : -decode - 1], past_key_values=cache, logits_to_keep=1)
    return cache


def losses(model, cache, windows, decode, plan, budget, interval):
    """Nats of each window's tokens, decoded step by step; [W, decode], on the CPU. The prompts stay in the cache."""
    plan = find_plan(plan, model.config)
    cache.use_plan(plan if budget is None else plan.with_budget(budget))
    cache.correction = None if interval is None else Correction(interval)
    found = []
    with torch.no_grad():
        for place in range(windows.shape[1] - decode - 1, windows.shape[1] - 1):
            logits = model(windows[:, place : place + 1], past_key_values=cache).logits[:, 0].float()
            found.append(torch.nn.functional.cross_entropy(logits, windows[:, place + 1], reduction="none"))
    cache.correction = None
    cache.crop(-decode)
    return torch.stack(found, 1).double().cpu()


def row(plan, budget, interval, gaps):
    """The mean over windows of a gap, and the share of the drift's part that correction closes; standard errors."""
    by_token = gaps[interval]
    gap, none, one = (None if gaps.get(which) is None else gaps[which].mean(1) for which in (interval, None, 1))
    found = {"plan": plan, "budget": budget, "interval": interval, "per_window": [round(float(x), 6) for x in gap]}
    found |= measured("gap", gap)
    if interval is not None:
        found |= measured("closed", none - gap)
        found["by_phase"] = [round(float(by_token[:, phase::interval].mean()), 5) for phase in range(interval)]
    if one is not None and interval != 1:
        found["share_closed"], found["share_closed_95"] = share(none - gap, none - one)
    return found


def measured(name, values):
    """Mean and standard error of the mean."""
    stderr = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return {name: round(float(values.mean()), 6), f"{name}_stderr": stderr and round(stderr, 6)}


def share(closed, drift):
    """Sum of `closed` over that of `drift`, and the interval in which 95 % of windows drawn anew have it."""
    picks = torch.randint(len(drift), (BOOTSTRAP, len(drift)), generator=torch.Generator().manual_seed(0))
    drawn = (closed[picks].sum(1) / drift[picks].sum(1)).quantile(torch.tensor([0.025, 0.975]).double())
    return round(float(closed.sum() / drift.sum()), 4), [round(float(end), 4) for end in drawn]


def write(rows, device, options, settings):
    """Writes the JSON object."""
    report = {
        **environment(device),
        "dtype": options.dtype,
        "text": options.text.name if options.text else "Paul Graham's essays",
    }
    report |= {name: getattr(settings, name) for name in ("context", "decode", "windows", "offset", "stride")}
    with whole_file(options.output) as temporary:
        temporary.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
