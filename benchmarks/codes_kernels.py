"""Kernels of codes of keys, and of full attention with few KV heads, on one GPU: checked against the reference, timed.

    python benchmarks/codes_kernels.py --output benchmarks/results/codes_kernels_h100.json

First a grid of shapes is checked; then the operations of a layer are timed in CUDA graphs at the shapes of the bars,
budget 1,024, a set for each KV head. `over_full` is over the faster of SDPA and our full attention of the same shape.
At 100K the choice is timed with budgets of 8K and 16K, too. Processes side by side compile the kernels beforehand.
Random K and V, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from tidaldecode import ops
from tidaldecode.bench.caches import CacheShape, LayerCaches
from tidaldecode.bench.choosing import choosing_workloads, coded
from tidaldecode.bench.layers import layer_workloads
from tidaldecode.bench.timing import rotated_buffers, time_gpu
from tidaldecode.bench.workload import Workload
from tidaldecode.ops import KV, Choice, codes, kernels, reference, rounds
from tidaldecode.ops.codes import room_for_codes
from tidaldecode.ops.kernels import code_scores, launch, select
from tidaldecode.results.environment import environment
from tidaldecode.whole_file import whole_file

DEVICE, DTYPE, BUDGET = torch.device("cuda"), torch.bfloat16, 1024
LARGE_BUDGETS = (8192, 16_384)  # at 100K: many candidates in the bin where the budget ends
SHAPES = {  # query heads, KV heads, head dim, sequences, context
    "8 KV heads, 100K, batch 1": (32, 8, 128, 1, 102_400),
    "8 KV heads, 32K, batch 12": (32, 8, 128, 12, 32_768),
    "2 KV heads, 32K, batch 1": (12, 2, 128, 1, 32_000),
    "2 KV heads, 32K, batch 32": (12, 2, 128, 32, 32_000),
    "32 KV heads, 100K, batch 1": (32, 32, 128, 1, 102_400),
}
PREFILL = (32, 8, 128, 1, 32_768)
GROUPS, CONTEXTS = (3, 5, 6, 7), (8192, 32_768)
FEW_KV_HEADS = [(kv * group, kv, 128, 1, context) for kv in (1, 2, 4) for group in GROUPS for context in CONTEXTS]
LENGTHS, CHOSEN = (5000, 30, 1999, 4096), 300  # of the checks
STEP_LENGTHS = (1, 10, 16, 17, 5000)  # about as many tokens as the centre is of, and many
CHECKED = ((4, 1, 64), (32, 8, 128), (12, 2, 128), (7, 1, 96), (16, 1, 128), (2, 2, 256))
CHECKED_FULL = ((1, 6, (32_000,)), (2, 6, (32_000,)), (4, 7, (8192,)), (2, 3, (32_000, 5, 9000)), (1, 5, (7,)))
OPERATIONS = {"sdpa", "full", "select per_group", "sparse per_group"}
SCORING = [  # tokens, warps, programs, stages
    (64, 1, 16, 3), (64, 1, 12, 3), (64, 1, 20, 3), (64, 1, 32, 3), (64, 1, 16, 4), (128, 1, 12, 3), (128, 1, 10, 3),
    (128, 2, 8, 3), (256, 2, 8, 3), (256, 4, 4, 3),
]  # fmt: skip
CHOOSING = [
    {"_FINISHES": False}, {"_FINISHING_REGISTERS": 64}, {"_FINISHING_REGISTERS": 128}, {"_PROGRAMS": 4},
]  # fmt: skip
LEAST_TILES = (1, 2, 8)  # of a program that scores
TILINGS = [(128, 4, 3, 1), (64, 4, 3, 1), (64, 2, 3, 2), (64, 4, 3, 2), (128, 8, 3, 1)]


def main() -> None:
    """Prints a table last, and writes one JSON object."""
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("codes_kernels.py measures kernels: it needs a GPU")
    torch.manual_seed(0)
    if options.warm:
        return warm(*map(int, options.warm.split("/")), options.sweep)
    begun = time.perf_counter()
    compiled(options)
    print(f"compiled in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    report = {**environment(DEVICE), "dtype": "bfloat16", "budget": BUDGET, "checks": [], "rows": []}
    for check in checks():
        report["checks"].append(check())
        print("check", report["checks"][-1], file=sys.stderr, flush=True)
    for part in parts(options.sweep, most=64):
        time_part(part, report, options.output)
        torch.cuda.empty_cache()
    print(table(report))
    print(f"{time.perf_counter() - begun:.0f} s in all")


def time_part(part, report, output):
    """Adds the rows of a part; nothing of its caches is left when it returns."""
    for row, workload in part():
        timing = time_gpu(workload.calls, DEVICE)
        full = [one["us"] for one in report["rows"] if one["shape"] == row["shape"] and is_full(one)]
        full += [timing.us] * is_full(row)
        over = round(timing.us / min(full), 4) if full else None
        report["rows"].append(row | {"us": round(timing.us, 2), "spread": round(timing.spread, 4), "over_full": over})
        print(line(report["rows"][-1]), file=sys.stderr, flush=True)
        with whole_file(output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def is_full(row):
    """Whether a row is full attention, to which others are compared."""
    return row["operation"] in ("sdpa", "full") and "variant" not in row


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true", help=argparse.SUPPRESS)  # block sizes, warps, stages, splits
    parser.add_argument("--processes", type=int, default=12, help="that compile side by side")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    return parser.parse_args()


def compiled(options: argparse.Namespace) -> None:
    """Runs each check and workload once in some process; Triton's cache on the disk has its kernels then."""
    command = [sys.executable, __file__, "--output", str(options.output), *["--sweep"] * options.sweep]
    shares = [f"{share}/{options.processes}" for share in range(options.processes)]
    running = [(share, subprocess.Popen([*command, "--warm", share])) for share in shares]
    for share, process in running:
        if process.wait():  # what failed there fails here, with its traceback, or there were too many for the memory
            print(f"compiling {share}: exit status {process.returncode}", file=sys.stderr, flush=True)


def warm(share: int, shares: int, sweep: bool) -> None:
    """A process's share; it holds the caches of one part at a time."""

    def run(part):
        for _, workload in part():
            workload.calls[0]()

    works = [*(partial(run, part) for part in parts(sweep, most=2)), *checks()]
    for work in works[share::shares]:
        work()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# ---- what is timed


Rows = Iterator[tuple[dict, Workload]]
"""Rows without times, and what is to be timed for each; a variant's settings hold until the next is asked for."""


def parts(sweep: bool, most: int) -> list[Callable[[], Rows]]:
    """What is timed, each part with caches of its own. The largest come first: so no process has two of them."""
    found: list[Callable[[], Rows]] = [partial(operations, name, most) for name in SHAPES]
    if sweep:
        found += [partial(swept_choices, name, most) for name in SHAPES if "8 KV heads" in name]
        found += [partial(swept_stretches, name, most) for name in SHAPES if "batch 1" in name.split(", ")]
    return [*found, prefill, *(partial(few_kv_heads, shape, most, sweep) for shape in FEW_KV_HEADS)]


def operations(name, most):
    """A layer's operations, the choice by codes among them, and its launches."""
    caches = caches_of(SHAPES[name], most)
    for workload in chain(layer_workloads(caches, (BUDGET,)), choosing_workloads(caches, (BUDGET,))):
        if workload.name in OPERATIONS or workload.name.startswith(("choice", "quantized_select", "quest")):
            yield {"shape": name, "operation": workload.name}, workload
    for workload in choosing_workloads(caches, LARGE_BUDGETS) if "100K" in name else ():
        if workload.name.startswith("choice"):
            yield {"shape": name, "operation": f"{workload.name}, budget {workload.budget}"}, workload
    for bits in (1, 2):
        for part, workload in parts_of_a_choice(caches, bits):
            yield {"shape": name, "operation": f"{part} {bits} bit{'s' * (bits > 1)}"}, workload


def caches_of(shape, most):
    """Caches enough that the L2 cache keeps nothing of codes of one bit, or of the tokens of a set."""
    heads, kv_heads, dim, batch, context = shape
    least = batch * kv_heads * min(context * (dim // 8 + 2), BUDGET * 4 * dim)
    return LayerCaches.random(
        CacheShape(heads, kv_heads, dim, batch, context, DTYPE), rotated_buffers(least, DEVICE, most), DEVICE, seed=0
    )


def parts_of_a_choice(caches, bits):
    """The launches before the choice: queries turned, codes scored."""
    layers = [coded(caches, layer, bits) for layer in range(len(caches))]
    shape, query = caches.shape, caches.queries
    pair = rounds.pair_of(layers[0].codes.packed.shape[3], shape.heads // shape.kv_heads)
    choice = Choice.alike(caches.lengths, BUDGET)
    indices = caches.lengths.new_zeros(shape.batch, shape.kv_heads, BUDGET)
    turned = [code_scores.turned_query(each, layers[0].codes) for each in query]

    def score(layer):
        tile = rounds.tile_of(pair)
        room = select.Choosing(query[layer], layers[layer], choice, shape.context, tile, [indices], pair).scores
        code_scores.score(*turned[layer], layers[layer], layers[layer].codes, caches.scale, room, 0)

    yield "turn", Workload.on_layers(caches, "", lambda layer: code_scores.turned_query(query[layer], layers[0].codes))
    yield "score", Workload.on_layers(caches, "", score)


def choices_to_sweep(name, caches):
    """Rows of the choice by codes of one bit and of two."""
    for workload in choosing_workloads(caches, (BUDGET,)):
        if workload.name in ("choice 1 bit", "choice 2 bits"):
            yield {"shape": name, "operation": workload.name}, workload


def swept_stretches(name, most):
    """The choice by codes with other floors of what a program scores: they matter where KV heads are few."""
    for row, workload in choices_to_sweep(name, caches_of(SHAPES[name], most)):
        for tiles in LEAST_TILES:
            with given(code_scores, _LEAST_TILES=tiles):
                yield row | {"variant": f"at least {tiles} tiles"}, workload


def swept_choices(name, most):
    """The choice by codes with other block sizes, warps and stages."""
    caches = caches_of(SHAPES[name], most)
    for row, workload in choices_to_sweep(name, caches):
        for tokens, warps, programs, stages in SCORING:
            scoring = given(code_scores, _WARPS=warps, _PROGRAMS=programs, _STAGES=stages)
            with scoring, given(rounds, _TILE=tokens, _ROWS=16 * warps):
                yield row | {"variant": f"tile {tokens}, {warps} warps, {programs} programs, {stages} stages"}, workload
        for settings in CHOOSING:
            with given(select, **settings):
                yield row | {"variant": str(settings)}, workload
        with given(rounds, _LARGEST=1024):
            yield row | {"variant": "chunks of 1,024"}, workload
    workload = next(one for one in layer_workloads(caches, (BUDGET,)) if one.name == "select per_group")
    for few in (1, 2):  # exact select layers: importances kept, or made of the scores twice
        with given(select, _FEW_HEADS=few):
            yield {"shape": name, "operation": workload.name, "variant": f"_FEW_HEADS {few}"}, workload


def prefill():
    """Attention of a prompt of 32K tokens, and its writing, with codes and without."""
    caches = caches_of(PREFILL, 2)
    query = torch.randn(1, PREFILL[0], PREFILL[4], PREFILL[2], device=DEVICE, dtype=DTYPE)

    def attend(layer):
        keys, values = caches.keys[layer], caches.values[layer]
        return scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

    yield {"shape": "prefill, 32K", "operation": "sdpa"}, Workload.on_layers(caches, "", attend)
    for bits in (0, 1, 2, 4):
        layers = [coded(caches, layer, bits) if bits else caches.kv(layer) for layer in range(2)]

        def write(layer, layers=layers):
            kv = layers[layer]
            ops.write_kv(kv.k, kv.v, kv, kv.lengths)

        yield {"shape": "prefill, 32K", "operation": f"write_kv, {bits} bits"}, Workload.on_layers(caches, "", write)


def few_kv_heads(shape, most, sweep):
    """Full attention by SDPA and by ours; swept, by other tilings."""
    caches, name = caches_of(shape, most), "{} heads, {} KV heads, {}, batch {}, {}".format(*shape)
    both = [one for one in layer_workloads(caches, (BUDGET,)) if one.name in ("sdpa", "full")]
    for workload in both:
        yield {"shape": name, "operation": workload.name}, workload
    if sweep and shape[0] // shape[1] == 6:
        for tiling in TILINGS:
            with given(kernels, _tiling=lambda query, tiling=tiling: launch.Tiling(*tiling)):
                yield {"shape": name, "operation": "full", "variant": f"tiling {tiling}"}, both[1]
        for channels in (16, 64):
            with given(launch, _MERGED_CHANNELS=channels):
                yield {"shape": name, "operation": "full", "variant": f"merged by {channels} channels"}, both[1]


@contextmanager
def given(module, **settings):
    """A module's constants, for a while."""
    before = {name: getattr(module, name) for name in settings}
    for name, value in settings.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


# ---- checks


def checks():
    """Kernels against the reference: codes, importances of the chosen, in order, and the output of full attention."""
    found = [
        partial(check, bits, *shape, block)
        for check, bits, shape, block in product((checked_choice, checked_step), (1, 2, 4), CHECKED, (0, 16))
    ]
    return found + [partial(checked_full, kv * group, kv, lengths) for kv, group, lengths in CHECKED_FULL]


def ragged(bits, heads, kv_heads, dim, block, lengths):
    """Caches of one layer, and the layer's: of sequences of these lengths, in blocks if they have a size, uncoded."""
    most = -(-max(lengths) // 16) * 16
    caches = LayerCaches.random(CacheShape(heads, kv_heads, dim, len(lengths), most, DTYPE), 1, DEVICE, seed=0)
    kv = in_blocks(caches.kv(0), block) if block else caches.kv(0)
    lengths = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    return caches, replace(kv, lengths=lengths, codes=room_for_codes(kv.k, bits))


def compared(mine, wanted, tokens):
    """Codes and factors of so many tokens; sums in another order differ at the border of two codes."""
    apart = (mine.packed != wanted.packed).sum().item()
    share = apart / (tokens * mine.packed.shape[2] * mine.packed.shape[3])
    factors = wanted.factors.float()
    worst = ((mine.factors.float() - factors).abs() / factors.abs().clamp(min=1e-6)).max().item()
    right = (share < 0.01 or apart <= 4) and worst < 1e-2  # a step writes few bytes: one of them is much
    return {"bytes_apart": round(share, 6), "factors_apart": round(worst, 6), "right": right}


def checked_step(bits, heads, kv_heads, dim, block):
    """K, V and codes of one token a sequence, written at once."""
    _, kv = ragged(bits, heads, kv_heads, dim, block, STEP_LENGTHS)
    before, new = replace(kv, lengths=kv.lengths - 1), torch.ones_like(kv.lengths)
    codes.write_codes(before, before.lengths, sum(STEP_LENGTHS))
    rows = torch.randn(2, len(new), 1, kv_heads, dim, device=DEVICE, dtype=DTYPE)
    written = []
    for operations in (kernels, reference):
        room = replace(kv.codes, packed=kv.codes.packed.clone(), factors=kv.codes.factors.clone())
        written.append(replace(kv, k=kv.k.clone(), v=kv.v.clone(), codes=room))
        operations.write_kv(*rows, written[-1], new)
    mine, wanted = written
    coded_anew = sum(length if length <= codes.CENTRE_TOKENS else 1 for length in STEP_LENGTHS)
    found = compared(mine.codes, wanted.codes, coded_anew)
    found["right"] &= torch.equal(mine.k, wanted.k) and torch.equal(mine.v, wanted.v)
    return {"step": [bits, heads, kv_heads, dim, block], **found}


def checked_choice(bits, heads, kv_heads, dim, block):
    """Codes and sets of ragged sequences; tokens whose importances agree in their first 8 bits count as equal."""
    caches, kv = ragged(bits, heads, kv_heads, dim, block, LENGTHS)
    kernels.write_codes(kv, kv.lengths, sum(LENGTHS))
    by_reference = replace(kv, codes=room_for_codes(kv.k, bits))
    codes.write_codes(by_reference, kv.lengths, sum(LENGTHS))
    found = compared(kv.codes, by_reference.codes, sum(LENGTHS))
    choice, most = Choice.alike(kv.lengths, CHOSEN, 20, 4), caches.shape.context
    sets = torch.zeros(2, len(LENGTHS), kv_heads, CHOSEN, device=DEVICE, dtype=torch.int32)
    query, seen, chosen = caches.queries[0], [], reference.select_tokens
    with given(reference, select_tokens=lambda *args: (seen.append(args[0]), chosen(*args))):
        reference.choose_by_codes(query, kv, caches.scale, ["per_group"], choice, most, sets[0])
    kernels.choose_by_codes(query, kv, caches.scale, ["per_group"], choice, most, sets[1])
    worst, common = 0.0, 1.0
    for b, length in enumerate(LENGTHS):
        rows = sets[:, b, :, : min(CHOSEN, length)].long()
        theirs, mine = (seen[0][b].gather(1, part).sort(-1).values for part in rows)
        worst = max(worst, ((mine - theirs).abs() / theirs.clamp(min=1e-9)).max().item())
        for one, other in zip(*rows.tolist(), strict=True):
            assert len(set(other)) == len(other)
            common = min(common, len(set(one) & set(other)) / len(one))
    names = {"bits": bits, "heads": heads, "kv_heads": kv_heads, "head_dim": dim, "block": block}
    found["right"] &= worst < 2**-6
    return names | {"worst": round(worst, 5), "common": round(common, 4), **found}


def in_blocks(kv, size):
    """A contiguous cache as a paged one, its blocks in any order."""
    table = torch.randperm(kv.k.shape[0] * kv.k.shape[1] // size, device=DEVICE).int().view(len(kv.block_table), -1)
    blocks = table.flatten().long()

    def paged(rows):
        room = rows.new_empty(len(blocks), size, *rows.shape[2:])
        room[blocks] = rows.reshape(-1, size, *rows.shape[2:])
        return room

    return KV(paged(kv.k), paged(kv.v), table, kv.lengths)


def checked_full(heads, kv_heads, lengths):
    """Full attention of ragged sequences against the reference in float64."""
    caches = LayerCaches.random(CacheShape(heads, kv_heads, 128, len(lengths), max(lengths), DTYPE), 1, DEVICE, seed=0)
    kv = replace(caches.kv(0), lengths=torch.tensor(lengths, device=DEVICE, dtype=torch.int32))
    exact = KV(kv.k.double(), kv.v.double(), kv.block_table, kv.lengths)
    wanted = reference.full_attention(caches.queries[0].double(), exact, caches.scale)
    error = (kernels.full_attention(caches.queries[0], kv, caches.scale).double() - wanted).norm() / wanted.norm()
    return {"full": [heads, kv_heads, *lengths], "error": round(error.item(), 6), "right": error.item() < 1e-2}


def line(row):
    """A row of the table."""
    over = "" if row["over_full"] is None else f"{row['over_full']:.3f}"
    what = f"{row['operation']}, {row['variant']}" if "variant" in row else row["operation"]
    return f"{row['shape']:<38} {what:<70} {row['us']:>9.1f} us {over:>7}"


def table(report):
    """What the bars ask for, the best variants, and what is wrong."""
    wrong = [check for check in report["checks"] if not check["right"]]
    lines = [f"{len(report['checks'])} checks, wrong: {wrong or 'none'}"]
    lines += [line(row) for row in report["rows"] if "variant" not in row]
    best: dict[tuple[str, str], list] = {}
    for row in report["rows"]:
        if "variant" in row:
            best.setdefault((row["shape"], row["operation"]), []).append(row)
    for rows in best.values():
        lines += [line(row) for row in sorted(rows, key=lambda row: row["us"])[:3]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
