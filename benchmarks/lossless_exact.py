"""Greedy lossless tokens of the demo model against full attention's, over many prompts, plans, T and batches.

    python benchmarks/lossless_exact.py --output lossless_exact.json

In float32 every token must be full attention's. In bfloat16 verification sums in another order than a step of a single
token: a text may leave full attention's where its two best logits are within rounding of each other. Each such place is
listed with the margin between the two tokens in full attention's logits, computed from the text up to there.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import torch

import tidaldecode
from tidaldecode.evaluate.generation import first_difference
from tidaldecode.hf import TidalCache
from tidaldecode.models import find_model
from tidaldecode.plans import shipped_plans
from tidaldecode.results.environment import environment
from tidaldecode.texts.text import paul_graham_essays
from tidaldecode.whole_file import whole_file


def main() -> None:
    """Prints a line for each setting, and writes one JSON object."""
    options = parse()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    files = find_model("smollm2-135m")
    text = files.tokenizer()(paul_graham_essays(), return_tensors="pt", verbose=False).input_ids[0]
    model = tidaldecode.apply(files.model(device, dtype), "full")
    prompts = [text[7000 * index :][: options.context - 37 * (index % 4)] for index in range(options.prompts)]
    cache = empty_cache(model, "full", options)
    full = [generate(model, [prompt], cache, options)[0] for prompt in prompts]
    rows = []
    for length, batch, plan in product(options.lengths, options.batches, options.plans):
        rows.append(compared(model, prompts, full, plan, length, batch, options))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        write(rows, device, options)  # a run that is stopped keeps what it has


def write(rows, device, options):
    """Writes the JSON object."""
    parts = {name: getattr(options, name) for name in ("dtype", "context", "prompts", "new_tokens")}
    with whole_file(options.output) as temporary:
        temporary.write_text(
            json.dumps({**environment(device), **parts, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


def parse() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--context", type=int, default=1500)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--lengths", type=numbers, default=[1, 8, 32])
    parser.add_argument("--batches", type=numbers, default=[1, 4])
    parser.add_argument("--plans", type=lambda text: text.split(","), default=["smollm2-135m", "smollm2-135m-paper"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def empty_cache(model, plan, options):
    """A cache for one plan; one for all prompts, so that on a GPU graphs are captured once and not for each."""
    plan = tidaldecode.TidalPlan.full(30) if plan == "full" else shipped_plans()[plan].with_budget(options.budget)
    return TidalCache(model.config, plan, options.context + options.new_tokens + max(options.lengths))


def generate(model, prompts, cache, options, lossless=None):
    """New tokens of each of several prompts side by side."""
    cache.reset()
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    settings = {"max_new_tokens": options.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=cache,
        lossless=lossless,
        **settings,
    )
    return output[:, width:].tolist()


def compared(model, prompts, full, plan, length, batch, options):
    """Where lossless texts leave full attention's, for one plan, draft length and batch."""
    places, tokens, sequences = [], 0, 0
    cache = empty_cache(model, plan, options)
    for start in range(0, len(prompts), batch):
        texts = generate(model, prompts[start : start + batch], cache, options, length)
        tokens, sequences = tokens + sum(cache.rounds.tokens), sequences + sum(cache.rounds.sequences)
        for number, text in enumerate(texts, start):
            place = first_difference(text, full[number])
            if place is not None:
                places.append({"prompt": number, **margin(model, prompts[number], full[number], text, place)})
    return {
        "plan": plan,
        "budget": options.budget,
        "lossless": length,
        "batch": batch,
        "accepted_per_round": round(tokens / sequences, 4),
        "differing_texts": len(places),
        "places": places,
    }


def margin(model, prompt, full, text, place):
    """How far apart full attention's logits of the two tokens are, at the first place in which the texts differ."""
    seen = torch.cat([prompt, torch.tensor(full[:place], dtype=prompt.dtype)])[None].to(model.device)
    with torch.no_grad():
        logits = model(seen, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return {"token": place, "margin_of_logits": round(float(logits[full[place]] - logits[text[place]]), 5)}


if __name__ == "__main__":
    main()
