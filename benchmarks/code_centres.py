"""What codes of keys are centred on: the attention mass that the tokens chosen by them do not hold.

    python benchmarks/code_centres.py --contexts 2048,4096,7600 --windows 2 --output code_centres_smollm2-135m.json

Every layer from 2 on chooses for each KV head, by codes of its keys, for the last tokens of windows of the essays; what
it chose is weighed with full attention's own probabilities. Less is better, and `exact` choosing loses least.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import tidaldecode
from tidaldecode.hf import TidalCache
from tidaldecode.hf.session import Session
from tidaldecode.models import find_model, model_shape, steady_channels
from tidaldecode.ops.codes import decode, encode, room_for_codes
from tidaldecode.results.environment import environment
from tidaldecode.texts.text import Text, paul_graham_essays
from tidaldecode.whole_file import whole_file

LAST = 48  # tokens whose queries choose
SINKS, RECENT = 4, 16


def main() -> None:
    """Prints a line for each context, number of bits and centre, and writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=lambda given: [int(part) for part in given.split(",")], default=[4096])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    files = find_model("smollm2-135m")
    text = Text.tokenize(files.tokenizer(), iter([paul_graham_essays()]))
    model = tidaldecode.apply(files.model(torch.device("cpu"), torch.float32), "full")
    steady = torch.tensor(steady_channels(model.config), dtype=torch.float32)
    rows = []
    for context in options.contexts:
        lost: dict[tuple[int, str], list[float]] = {}
        for window in range(options.windows):
            ids = text.window(3000 + 15000 * window, context)
            for keys, query in keys_and_queries(model, ids):
                for name, value in lost_mass(keys, query, options.budget, steady):
                    lost.setdefault(name, []).append(value)
        for (bits, centre), values in lost.items():
            mean = sum(values) / len(values)
            rows.append({"context": context, "bits": bits, "centre": centre, "lost_mass": round(mean, 4)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {**environment(torch.device("cpu")), "model": "smollm2-135m", "budget": options.budget, "rows": rows}
    with whole_file(options.output) as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def keys_and_queries(model, ids):
    """For each layer from 2 on the keys of a window, [T, Hkv, D], and its last queries, [n, Hkv, G, D]."""
    shape, queries, attend = model_shape(model.config), {}, Session.attend

    def caught(session, layer, query, scale):
        queries[layer] = query[0, -LAST:].clone()
        return attend(session, layer, query, scale)

    cache = TidalCache(model.config, "full", ids.shape[-1])
    Session.attend = caught
    try:
        with torch.inference_mode():
            for part in torch.split(ids.view(1, -1), 1024, 1):
                model(part, past_key_values=cache, logits_to_keep=1)
    finally:
        Session.attend = attend
    for layer in range(2, shape.num_layers):
        keys = cache.layers[layer].keys[0].transpose(0, 1)
        yield keys, queries[layer].view(LAST, shape.num_kv_heads, shape.group_size, shape.head_dim)


def lost_mass(keys, query, budget, steady):
    """By bits and centre, the mass that the chosen tokens do not hold: the mean over queries and heads."""
    token, last = torch.arange(len(keys)), torch.arange(len(keys) - LAST, len(keys))[:, None]
    past = token > last
    given = (token < SINKS) | (token > last - RECENT)

    def probabilities(query, keys):
        scores = torch.einsum("nhgd,thd->nhgt", query, keys) * query.shape[-1] ** -0.5
        return scores.masked_fill(past[:, None, None], -torch.inf).softmax(-1)

    exact = probabilities(query, keys)

    def lost(estimated):
        importance = estimated.mean(2).masked_fill((given & ~past)[:, None], 2)
        chosen = importance.topk(budget, -1).indices[:, :, None].expand(-1, -1, query.shape[2], -1)
        return 1 - exact.gather(-1, chosen).sum(-1).mean().item()

    yield (0, "exact"), lost(exact)
    first = keys[:16].mean(0)
    centres = {
        "none": torch.zeros_like(first),
        "first 16 keys": first,
        "first 16 keys, steady channels": first * steady,
        "first 1,024 keys": keys[:1024].mean(0),
        "all keys": keys.mean(0),
    }
    for bits in (1, 2):
        room = room_for_codes(keys[None], bits)
        for name, centre in centres.items():
            codes = encode(keys, centre, room)
            yield (bits, name), lost(probabilities(query @ room.rotation, decode(*codes, bits)))


if __name__ == "__main__":
    main()
