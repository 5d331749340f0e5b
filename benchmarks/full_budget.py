"""Greedy tokens of the demo model on a GPU with a budget as long as the context, against full attention's.

    python benchmarks/full_budget.py > benchmarks/results/full_budget_smollm2-135m.json

Every sparse layer then reads everything, by the sparse kernel and from sets that were chosen: in float32 the tokens
must be full attention's. In bfloat16 the order of the sums can decide between two tokens that are nearly as likely; so
the first difference is given with the margin between them, and the same for two ways of full attention.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import tidaldecode
from tidaldecode.models.find import find_model
from tidaldecode.plans import shipped_plans
from tidaldecode.results.environment import environment
from tidaldecode.texts.text import paul_graham_essays

CONTEXT, NEW_TOKENS = 4000, 201


def main() -> None:
    """Prints one JSON object, a row for each dtype and plan."""
    device = torch.device("cuda")
    files = find_model("smollm2-135m")
    ids = files.tokenizer()(paul_graham_essays(), return_tensors="pt", verbose=False).input_ids[:, :CONTEXT].to(device)
    plans = shipped_plans()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = files.model(device, dtype)
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        own = model.generate(ids, **options)[0, CONTEXT:]  # Transformers' own cache and SDPA
        tidaldecode.apply(model, "full")
        full = model.generate(ids, **options)[0, CONTEXT:]
        rows.append(compared(model, ids, dtype, "full attention, Transformers' own", own, full))
        for name in ("smollm2-135m", "smollm2-135m-paper"):
            cache = tidaldecode.TidalCache(model.config, plans[name].with_budget(1.0), CONTEXT + NEW_TOKENS)
            tokens = model.generate(ids, past_key_values=cache, **options)[0, CONTEXT:]
            assert cache.step is not None, "the step was not captured"
            rows.append(compared(model, ids, dtype, name, tokens, full))
            print(rows[-1], file=sys.stderr, flush=True)
        tidaldecode.remove(model)
    command = f"python benchmarks/{Path(__file__).name}"
    print(json.dumps({**environment(device), "command": command, "context_tokens": CONTEXT, "rows": rows}, indent=1))


def compared(model, ids, dtype, plan, tokens, full):
    """How many of a plan's tokens are full attention's, and how near the first other one was."""
    row = {"dtype": str(dtype).removeprefix("torch."), "plan": plan, "tokens": len(full)}
    differing = (tokens != full).nonzero()
    if len(differing) == 0:
        return {**row, "equal_tokens": len(full), "first_difference": None}
    first = int(differing[0])
    seen = torch.cat([ids, full[None, :first]], 1)
    with torch.no_grad():
        logits = model(seen, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    margin = float(logits[full[first]] - logits[tokens[first]])
    return {**row, "equal_tokens": first, "first_difference": first, "margin_of_logits": round(margin, 4)}


if __name__ == "__main__":
    main()
