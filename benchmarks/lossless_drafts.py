"""What drafts of lossless decoding give by the plan's layers and out of verification, over budgets, rules and lengths.

    python benchmarks/lossless_drafts.py --output benchmarks/results/lossless_drafts_smollm2-135m_cpu.json

Greedy decoding of the demo model behind prompts of the essays; every text must be full attention's, token for token, in
float32. `accepted_per_round` leaves out rounds that draft nothing: the first one out of verification, and a last one.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import torch

import tidaldecode
from tidaldecode.evaluate.prompt import read_prompt
from tidaldecode.hf import TidalCache
from tidaldecode.models import find_model
from tidaldecode.plans.find import find_plan
from tidaldecode.results.environment import environment
from tidaldecode.texts.text import Text, paul_graham_essays
from tidaldecode.texts.windows import Windows
from tidaldecode.whole_file import whole_file

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
GREEDY |= {"eos_token_id": None, "pad_token_id": 0}


def main() -> None:
    """Prints a line for each text, and writes one JSON object, anew after each window."""
    options = parse()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    files = find_model("smollm2-135m")
    text = Text.tokenize(files.tokenizer(), iter([paul_graham_essays()]))
    settings = Windows(options.context + options.new_tokens, options.new_tokens, options.windows, options.offset, 18000)
    settings.check_text(text)
    model = tidaldecode.apply(files.model(device, dtype), "full")
    ways = [plan(model.config, *way) for way in product(options.drafts, options.budgets)]
    report = {
        **environment(device),
        "plan": ways[0].name,
        "dtype": options.dtype,
        "context": options.context,
        "new_tokens": options.new_tokens,
    }
    cells = []
    for done, start in enumerate(settings.starts, 1):
        cells += window_cells(model, text.window(start, settings.context), ways, options)
        rows = [row(model.config, way, length, cells) for way, length in product(ways, options.lengths)]
        with whole_file(options.output) as temporary:
            answer = {**report, "starts": settings.starts[:done], "rows": rows}
            temporary.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=7800)
    parser.add_argument("--new-tokens", type=int, default=129)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--offset", type=int, default=77_000)
    parser.add_argument("--budgets", type=numbers, default=[256, 512])
    parser.add_argument("--lengths", type=numbers, default=[8])
    parser.add_argument(
        "--drafts",
        type=lambda text: text.split(","),
        default=["plan", "unified", "per_group"],
        help="`plan`, or the rule by which verification chooses",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def plan(config, drafts, budget):
    """The calibrated plan, drafting by its layers or out of verification by a rule."""
    calibrated = find_plan("auto", config).with_budget(budget)
    if drafts == "plan":
        return calibrated
    return calibrated.model_copy(update={"selection": drafts, "drafting": "verification"})


def window_cells(model, window, ways, options):
    """One window by full attention, then by every way and length: a dictionary each, behind one prefill."""
    cache = TidalCache(model.config, find_plan("full", model.config), window.shape[1] + max(options.lengths))
    rest = read_prompt(model, cache, window, options.new_tokens)
    full = generate(model, cache, window, rest, None)
    for way, length in product(ways, options.lengths):
        cache.use_plan(way)
        new = generate(model, cache, window, rest, length)
        rounds = [count for drafted, count in zip(cache.rounds.drafted, cache.rounds.tokens, strict=True) if drafted]
        cell = {"length": length, "tokens": sum(rounds), "rounds": len(rounds), "same": new == full}
        print(way.drafting, way.selection, way.token_budget, cell, file=sys.stderr, flush=True)
        yield {"plan": way, "context": cache.get_seq_length(), **cell}


def generate(model, cache, window, rest, length):
    """Greedy tokens behind the prompt, taken out of the cache again."""
    held = cache.get_seq_length()
    prompt = window[:, : held + 1].to(model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=rest.shape[1] - 1,
        lossless=length,
        **GREEDY,
    )
    cache.crop(held - cache.get_seq_length())
    return output[0, held + 1 :].tolist()


def row(config, way, length, cells):
    """One way to draft over all windows; `draft_reads`: share of the KV cache that a draft step reads, at most."""
    attention = TidalCache(config, way, 1).for_drafts(length).attention
    mine = [cell for cell in cells if cell["plan"] is way and cell["length"] == length]
    return {
        "drafting": way.drafting,
        "selection": way.selection if way.drafting == "verification" else None,
        "budget": way.token_budget,
        "lossless": length,
        "accepted_per_round": round(sum(cell["tokens"] for cell in mine) / sum(cell["rounds"] for cell in mine), 4),
        "by_window": [round(cell["tokens"] / cell["rounds"], 2) for cell in mine],
        "draft_reads": round(attention.kv_read_fraction(mine[0]["context"]), 4),
        "differing_texts": sum(not cell["same"] for cell in mine),
    }


if __name__ == "__main__":
    main()
