"""The benchmarks on a CPU, with tiny sizes: what they run, what they count and report; never how fast it was."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from command_line import assert_one_line
from families import FAMILIES
from tidaldecode import InputError, TidalCache, TidalPlan, apply, ops
from tidaldecode.bench import caches as caches_module
from tidaldecode.bench import decode as decode_module
from tidaldecode.bench import hardware, layers, operations, roofline, timing, timing_report
from tidaldecode.bench.caches import CacheShape, LayerCaches
from tidaldecode.bench.choosing import choosing_workloads
from tidaldecode.bench.decode import bench_decode
from tidaldecode.bench.filling import TextKV
from tidaldecode.bench.layers import layer_workloads
from tidaldecode.bench.methods import step_attention
from tidaldecode.bench.operations import bench_operations
from tidaldecode.bench.roofline import floor_us, kv_bytes, read_bandwidth_gbs, weight_bytes
from tidaldecode.bench.settings import TIMED_METHODS, DecodeSettings, OperationsSettings
from tidaldecode.bench.shapes import CONFIGS, RandomModel
from tidaldecode.bench.steps import step_workloads
from tidaldecode.bench.timing import Timing, rotated_buffers, time_gpu, time_steps
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models import check_architecture, check_dtype, model_shape
from tidaldecode.ops.codes import room_for_codes
from tidaldecode.plan import tokens_of
from tidaldecode.plans.find import find_plan
from tidaldecode.results.timings import DecodeRow
from tidaldecode.texts.text import Text

CPU = torch.device("cpu")
SHAPE = CacheShape(heads=6, kv_heads=3, head_dim=16, batch=2, context=40, dtype=torch.float32)
LAYER_OPERATIONS = {
    "sdpa",
    "full",
    "multi_query 8",
    "multi_query 32",
    "write_kv",
    *(f"{name} {rule}" for name in ("importance", "selection", "select", "sparse") for rule in layers.RULES),
}
CHOOSING_OPERATIONS = {
    "quest", *(f"{name} {bits}" for name in ("choice", "quantized_select") for bits in ("1 bit", "2 bits", "4 bits"))
}  # fmt: skip
STEPS = ("step full (sdpa)", "step full", "step tidal", "step tidal unified", "step quest", "step streaming")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few replays, of small memory."""
    monkeypatch.setattr(timing, "_FEWEST_REPLAYS", 2)
    monkeypatch.setattr(timing, "_MOST_REPLAYS", 2)
    monkeypatch.setitem(roofline._BYTES, "cpu", 2**20)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for `clock.tick(ms)`."""

    class Clock:
        now = 100.0

        def tick(self, ms):
            self.now += ms / 1000

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


# ---- timing


def test_median_and_spread():
    found = Timing.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (found.ms, found.us) == (3, 3000)
    assert found.spread == pytest.approx((4 - 2) / 3)


def test_time_of_a_call_is_that_of_all_over_their_number(clock):
    ran = []

    def call(index, ms):
        ran.append(index)
        clock.tick(ms)

    calls = [lambda: call(0, 2), lambda: call(1, 4), lambda: call(2, 6)]
    found = time_gpu(calls, CPU)
    assert found.ms == pytest.approx(4)
    assert found.spread == pytest.approx(0, abs=1e-6)
    assert ran == [0, 1, 2] * (len(ran) // 3)


def test_steps_to_warm_up_do_not_count(clock):
    times = itertools.cycle([500, 400, 1, 2, 3])
    found = time_steps(lambda: clock.tick(next(times)), CPU, warm_up=2, steps=3, repeats=2)
    assert found.ms == pytest.approx(2)
    assert found.spread == pytest.approx(0.75)  # of 1, 1, 2, 2, 3, 3


def test_more_replays_where_they_take_no_longer(clock, monkeypatch):
    monkeypatch.setattr(timing, "_MOST_REPLAYS", 9)
    for ms, replays in ((5.0, 2 + 9), (20.0, 2 + 2)):
        ran = []
        time_gpu([lambda ms=ms, ran=ran: (ran.append(0), clock.tick(ms))], CPU)
        assert len(ran) == replays


def test_rotated_buffers(monkeypatch):
    assert rotated_buffers(1, CPU) == 2
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 50 * 10**6)
    assert rotated_buffers(40 * 10**6, CPU) == 4
    assert rotated_buffers(10**9, CPU) == 2
    assert rotated_buffers(1000, CPU, most=20) == 20


@pytest.mark.gpu
def test_a_graph_replays_every_call():
    counters = [torch.zeros((), device="cuda") for _ in range(3)]
    found = time_gpu([lambda counter=counter: counter.add_(1) for counter in counters], torch.device("cuda"))
    counts = {int(counter) for counter in counters}
    assert len(counts) == 1
    assert counts.pop() >= 1 + 2 + 2  # warm-up, then replays
    assert found.ms > 0


# ---- rooflines


def test_kv_bytes_and_floor():
    num_bytes = kv_bytes(1000, 2, 8, 128, torch.bfloat16)
    assert num_bytes == 2 * 1000 * 2 * 8 * 128 * 2
    assert floor_us(num_bytes, 4096.0) == pytest.approx(2)
    assert SHAPE.kv_bytes(40) == 2 * 2 * 3 * 40 * 16 * 4


def test_read_bandwidth_is_that_of_the_faster_sum(monkeypatch):
    times = iter([Timing(0.5, 0.0), Timing(0.25, 0.0)])
    monkeypatch.setattr(roofline, "time_gpu", lambda calls, device: [call() for call in calls] and next(times))
    assert read_bandwidth_gbs(CPU) == pytest.approx(2**20 / 0.25e-3 / 1e9)


def test_weights_that_a_step_reads(tiny):
    def size(model):
        return sum(weight.numel() for weight in model.parameters()) * 4

    untied, tied = tiny("llama", tie_word_embeddings=False), tiny("llama", tie_word_embeddings=True)
    assert weight_bytes(untied, batch=1) == size(untied) - 260 * 96 * 4
    assert weight_bytes(tied, batch=1) == size(tied)
    assert weight_bytes(untied, batch=1) == weight_bytes(tied, batch=1)


def test_experts_that_a_step_reads(tiny):
    model = tiny("mixtral", tie_word_embeddings=False)  # 2 of 3 experts for each token
    experts = 7 * 3 * 3 * 64 * 64 * 4  # layers, experts, projections
    everything = sum(weight.numel() for weight in model.parameters()) * 4 - 260 * 64 * 4
    assert weight_bytes(model, batch=1) == pytest.approx(everything - experts / 3)
    assert weight_bytes(model, batch=2) == pytest.approx(everything)


# ---- memory and dtypes


def test_caches_that_fit(monkeypatch):
    one = SHAPE.kv_bytes(40)
    beside = 4 * 2 * 6 * 40 * 4 + 8 * one / 8
    for free, count in ((1000 * one, 8), (6.3 * one + beside, 5), (2 * one + beside, 2)):
        for module in (hardware, caches_module):
            monkeypatch.setattr(module, "free_bytes", lambda device, free=free: free + 1)
        assert SHAPE.caches_that_fit(8, 10, CPU) == count
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 2 * one)
    with pytest.raises(
        InputError, match=r"3 KV heads, 40 tokens, batch 2: 0\.0 GiB of memory are needed, .*--contexts"
    ):
        SHAPE.caches_that_fit(8, 10, CPU)


def test_more_caches_where_the_l2_cache_would_hold_them(monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 10 * SHAPE.kv_bytes(10))
    assert SHAPE.caches_that_fit(8, 10, CPU) == 30
    assert SHAPE.caches_that_fit(8, 40, CPU) == 8


def test_free_memory_of_this_machine():
    assert 2**20 < hardware.free_bytes(CPU) < 2**50


def test_bfloat16_on_an_old_gpu(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"Tesla T4 has compute capability 7\.5, .* --dtype float16"):
        check_dtype(gpu, torch.bfloat16)
    check_dtype(gpu, torch.float16)
    check_dtype(CPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_dtype(gpu, torch.bfloat16)


def test_memory_that_runs_out():
    with pytest.raises(InputError, match="memory ran out on cpu: buy more"), hardware.measuring(CPU, "buy more"):
        raise torch.OutOfMemoryError


# ---- operations


@pytest.fixture
def caches():
    return LayerCaches.random(SHAPE, 3, CPU, seed=0)


def named(workloads, name, budget=None):
    (found,) = [workload for workload in workloads if (workload.name, workload.budget) == (name, budget)]
    return found


def test_caches_differ_and_hold_no_zeros(caches):
    tensors = [*caches.keys, *caches.values, *caches.queries]
    assert all(tensor.std() > 0.9 for tensor in tensors)
    assert len({float(tensor.sum()) for tensor in tensors}) == 9
    assert caches.kv(1).k.shape == (2, 40, 3, 16)
    assert caches.kv(1).v.data_ptr() == caches.values[1].data_ptr()


def test_every_operation_is_there(caches):
    found = Counter(workload.name for workload in layer_workloads(caches, (8, 0.5)))
    assert found.keys() == LAYER_OPERATIONS
    for name, count in found.items():
        assert count == (2 if name.split()[0] in ("selection", "select", "sparse") else 1)
    short = LayerCaches.random(replace(SHAPE, context=20), 2, CPU, seed=0)
    assert "multi_query 32" not in [workload.name for workload in layer_workloads(short, (8,))]


def test_operations_attend_each_to_its_own_layer(caches):
    """With a budget of the whole context all of them give full attention."""
    workloads = list(layer_workloads(caches, (40,)))
    expected = [call() for call in named(workloads, "sdpa").calls]
    assert len(expected) == 3
    assert not torch.allclose(expected[0], expected[1])
    for name, budget in [("full", None), *((f"sparse {rule}", 40) for rule in layers.RULES)]:
        for call, output in zip(named(workloads, name, budget).calls, expected, strict=True):
            torch.testing.assert_close(call(), output)


def test_layers_that_choose_for_themselves(caches):
    """With a budget of the whole context they give full attention; what they must read goes by their codes."""
    expected = [call() for call in named(layer_workloads(caches, (40,)), "sdpa").calls]
    workloads = list(choosing_workloads(caches, (40, 12)))
    assert {workload.name for workload in workloads} == CHOOSING_OPERATIONS
    for name in ("quantized_select 1 bit", "quantized_select 4 bits"):
        for call, output in zip(named(workloads, name, 40).calls, expected, strict=True):
            torch.testing.assert_close(call(), output)
    codes = 2 * 3 * 40 * (16 * 2 // 8 + 2)
    assert named(workloads, "choice 2 bits", 12).floor_bytes == codes
    assert named(workloads, "quantized_select 2 bits", 12).floor_bytes == codes + 2 * 2 * 3 * 16 * 4 * 12


def test_sparse_sets_are_distinct_tokens_in_order(caches, monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "sparse_attention", lambda *arguments: seen.append(arguments[2:5]))
    for workload in layer_workloads(caches, (8,)):
        if workload.name.startswith("sparse"):
            workload.calls[0]()
    for (indices, counts, head_to_set), sets in zip(seen, (1, 3, 6), strict=True):
        assert indices.shape == (2, sets, 8)
        assert (indices.diff() > 0).all()
        assert (indices >= 0).all() and (indices < 40).all()
        assert counts.tolist() == [8, 8]
        assert head_to_set is None  # one set for all heads, each KV head, or each query head
    assert len({tuple(one) for one in seen[2][0].flatten(0, 1).tolist()}) == 12


def test_select_layers_choose_the_most_important_tokens(caches, monkeypatch):
    seen = {}
    original = ops.full_attention_with_selection

    def attend(query, *arguments):
        output = original(query, *arguments)
        seen[arguments[2][0]] = query, arguments[-1].clone()
        return output

    monkeypatch.setattr(ops, "full_attention_with_selection", attend)
    for workload in layer_workloads(caches, (8,)):
        if workload.name.startswith("select "):
            workload.calls[2]()
    assert list(seen) == list(layers.RULES)
    scores = torch.einsum("bhd,bhtd->bht", caches.queries[2], caches.keys[2].repeat_interleave(2, 1)) / 4
    probabilities = scores.softmax(-1)
    importance = {
        "unified": probabilities.mean(1, keepdim=True),
        "per_group": probabilities.unflatten(1, (3, 2)).mean(2),
        "per_head": scores,
    }
    for rule, (query, indices) in seen.items():
        assert query is caches.queries[2]
        best = importance[rule][..., :39].topk(7).indices.sort(-1).values
        assert torch.equal(indices.sort(-1).values[..., :7].long(), best)
        assert (indices.amax(-1) == 39).all()


def test_selection_alone_reads_the_importances_that_attention_wrote(caches, monkeypatch):
    written, read = [], []
    attend = ops.full_attention_with_importance
    monkeypatch.setattr(
        ops, "full_attention_with_importance", lambda *given: (written.append(given[-2:]), attend(*given))
    )
    monkeypatch.setattr(ops, "select_tokens", lambda importance, *given: read.append(importance))
    for workload in layer_workloads(caches, (8,)):
        if workload.name.split()[0] in ("importance", "selection"):
            workload.calls[1]()
    assert [rules for rules, _ in written] == [[rule] for rule in layers.RULES]
    assert [importance.data_ptr() for _, importance in written] == [importance.data_ptr() for importance in read]
    assert [importance.shape[1] for importance in read] == [1, 3, 6]


def test_write_kv_writes_the_last_token(caches):
    before = caches.keys[2].clone()
    named(layer_workloads(caches, (8,)), "write_kv").calls[2]()
    assert torch.equal(caches.keys[2][:, :, :39], before[:, :, :39])
    assert not torch.isclose(caches.keys[2][:, :, 39], before[:, :, 39]).any()


def test_floors_of_operations(caches):
    workloads = list(layer_workloads(caches, (8, 30)))
    row = 2 * 2 * 3 * 16 * 4  # K and V of one token, of both sequences and all KV heads
    for name in ("sdpa", "full", "importance unified", "multi_query 8"):
        assert named(workloads, name).floor_bytes == 40 * row
    assert named(workloads, "select per_head", 8).floor_bytes == 40 * row
    assert named(workloads, "selection per_head", 8).floor_bytes == 2 * 6 * 40 * 4
    assert named(workloads, "sparse unified", 8).floor_bytes == 8 * row
    assert named(workloads, "sparse per_group", 8).floor_bytes == 8 * row
    assert named(workloads, "sparse per_head", 8).floor_bytes == 16 * row
    assert named(workloads, "sparse per_head", 30).floor_bytes == 40 * row  # all that there is
    assert named(workloads, "write_kv").floor_bytes == row


# ---- the attention of a step


def test_steps_go_through_all_layers(caches, monkeypatch):
    seen = []
    original = DecodeAttention.attend

    def attend(self, layer, query, kv, scale):
        seen.append((layer, [keys.data_ptr() for keys in caches.keys].index(kv.k.data_ptr())))
        return original(self, layer, query, kv, scale)

    monkeypatch.setattr(DecodeAttention, "attend", attend)
    workload = named(step_workloads(caches, 5, (8,)), "step tidal", 8)
    workload.calls[0]()
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]  # three caches for five layers


def test_steps_and_their_floors(caches):
    workloads = list(step_workloads(caches, 6, (8, 0.25)))
    budgets = [(name, budget) for budget in (8, 0.25) for name in STEPS[2:]]
    assert [(workload.name, workload.budget) for workload in workloads] == [*((n, None) for n in STEPS[:2]), *budgets]
    row = 2 * 2 * 3 * 16 * 4
    for name in STEPS[:2]:
        assert named(workloads, name).floor_bytes == 6 * 40 * row
    pages = 2 * 4 + 10  # two pages that Quest reads, and the bounds of all, in tokens
    assert named(workloads, "step quest", 8).floor_bytes == (2 * 40 + 4 * pages) * row
    # layers 0, 1, 2 and 3 read all; the sets of two query heads share a KV head in the paper's plan
    assert named(workloads, "step tidal", 8).floor_bytes == (4 * 40 + 2 * 16) * row
    assert named(workloads, "step tidal unified", 8).floor_bytes == (4 * 40 + 2 * 8) * row
    assert named(workloads, "step tidal unified", 0.25).floor_bytes == (4 * 40 + 2 * 10) * row
    assert named(workloads, "step streaming", 8).floor_bytes == 6 * 8 * row
    for workload in workloads:
        workload.calls[0]()


def test_no_floor_is_above_the_whole_cache(caches):
    """Sets of two query heads are more than the cache at this budget; so are Quest's pages with their bounds."""
    for workload in step_workloads(caches, 6, (39,)):
        assert workload.floor_bytes <= 6 * 40 * 2 * 2 * 3 * 16 * 4


@pytest.mark.parametrize("method", TIMED_METHODS)
def test_a_budget_of_the_whole_context_is_full_attention(caches, method):
    plan = TidalPlan.paper(4)
    shape = SHAPE.model(4)
    attention = step_attention(method, plan, shape, 48, 40)  # three of Quest's pages
    attention.begin(caches.lengths, 40)
    for layer in range(4):
        attention.prepare(layer, caches.kv(layer % 3))
    for layer in range(4):
        cache = layer % 3
        arguments = (caches.queries[cache], caches.kv(cache), caches.scale)
        torch.testing.assert_close(attention.attend(layer, *arguments), ops.full_attention(*arguments))


def test_sdpa_attends_to_its_context_alone(caches):
    """A captured step can't follow the length."""
    attention = step_attention("sdpa", TidalPlan.paper(3), SHAPE.model(3), None, 25)
    attention.begin(caches.lengths, 40)
    kv, query = caches.kv(1), caches.queries[1]
    output = attention.attend(0, query, kv, caches.scale)
    shorter = replace(kv, lengths=torch.full_like(caches.lengths, 25))
    torch.testing.assert_close(output, ops.full_attention(query, shorter, caches.scale))


def test_budgets_in_tokens():
    assert [tokens_of(budget, 1000) for budget in (64, 0.1, 0.0001, 0.0505, 1.0)] == [64, 100, 2, 51, 1000]


# ---- bench ops


SETTINGS = OperationsSettings(
    heads=4, kv_heads=(2, 4), head_dim=8, contexts=(24, 40), budgets=(8, 0.5), layers=4, batch=2
)


def test_bench_operations():
    seen, progress = [], []
    report = bench_operations(SETTINGS, CPU, torch.float32, progress.append, seen.append)
    assert seen[-1] == report
    shapes = [(2, 24), (2, 40), (4, 24), (4, 40)]
    for number, part in enumerate(seen, start=1):
        assert list(dict.fromkeys((row.kv_heads, row.context) for row in part.rows)) == shapes[:number]
    assert len(seen) == 4
    assert {row.operation for row in report.rows} == LAYER_OPERATIONS | CHOOSING_OPERATIONS | set(STEPS)
    assert "step quest, 4 KV heads, 40 tokens" in progress
    for row in report.rows:
        base_name = STEPS[0] if row.operation.startswith("step") else "sdpa"
        (base,) = [
            other for other in report.rows
            if (other.operation, other.kv_heads, other.context) == (base_name, row.kv_heads, row.context)
        ]  # fmt: skip
        assert row.over_sdpa == pytest.approx(row.us / base.us, rel=1e-2)
        if row.operation.startswith("step"):
            assert row.speedup_vs_full == pytest.approx(base.us / row.us, rel=1e-2)
        else:
            assert row.speedup_vs_full is None
        assert row.us > 0 and row.spread >= 0 and not row.captured
        assert (row.heads, row.head_dim, row.batch, row.caches) == (4, 8, 2, 4)
    (full,) = [row for row in report.rows if (row.operation, row.kv_heads, row.context) == ("full", 4, 40)]
    assert full.floor_us == pytest.approx(2 * 2 * 4 * 40 * 8 * 4 / report.about["read_bandwidth_gbs"] / 1000, abs=1e-3)
    answer = json.loads(json.dumps(report.to_json()))
    assert {"command", "versions", "device", "dtype", "layers", "read_bandwidth_gbs", "rows"} == answer.keys()
    assert len(answer["rows"]) == len(report.rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": (2, 3)}, "4 query heads are no multiple of 3 KV heads"),
        ({"budgets": (8, 1)}, "token_budget: 1 is below"),
        ({"layers": 2}, "needs 3 layers"),
        ({"contexts": (8, 10**9)}, "1000000000 tokens, batch 2: .* GiB of memory are needed"),
    ],
)
def test_wrong_operations_are_refused_before_the_first(changes, message, monkeypatch):
    monkeypatch.setattr(timing_report, "read_bandwidth_gbs", lambda device: 1 / 0)
    with pytest.raises(InputError, match=message):
        bench_operations(replace(SETTINGS, **changes), CPU, torch.float32)


# ---- bench decode


DECODE = DecodeSettings(contexts=(40, 64), budgets=(16, 0.5), steps=2)


def test_bench_decode():
    seen, progress = [], []
    report = bench_decode(RandomModel("tiny"), DECODE, CPU, torch.float32, progress.append, seen.append)
    runs = ["full", "sdpa", *["tidal"] * 2, *["quest"] * 2, *["streaming"] * 2]
    assert [row.method for row in report.rows] == runs * 2
    assert [row.budget for row in report.rows] == [None, None, *[16, 0.5] * 3] * 2
    assert [row.context for row in report.rows] == [40] * 8 + [64] * 8
    assert [len(part.rows) for part in seen] == [8, 16]
    assert "tiny: quest 16, 64 tokens" in progress
    weights = (6 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64 + 256 * 64) * 4
    assert report.about["weight_gb"] == pytest.approx(weights / 1e9, abs=1e-4)
    for row in report.rows:
        base = min(other.step_ms for other in report.rows if other.context == row.context and other.budget is None)
        assert row.speedup_vs_full == pytest.approx(base / row.step_ms, rel=1e-2)
        assert row.over_floor == pytest.approx(row.step_ms / row.floor_ms, rel=2e-2)
        assert not row.captured
    full, tidal = report.rows[8], report.rows[10]
    for row, tokens in ((full, 6 * 64), (tidal, 4 * 64 + 2 * 32)):  # two query heads of a KV head, 16 tokens each
        assert row.floor_ms == pytest.approx(
            (weights + tokens * 2 * 2 * 16 * 4) / report.about["read_bandwidth_gbs"] / 1e6, abs=1e-4
        )
        assert row.kv_read_fraction == pytest.approx(tokens / (6 * 64), abs=1e-5)
    answer = json.loads(json.dumps(report.to_json()))
    assert {"device", "read_bandwidth_gbs", "model", "plan", "batch", "rows"} <= answer.keys()
    assert {"method", "context", "budget", "step_ms", "floor_ms", "speedup_vs_full"} <= answer["rows"][0].keys()


def test_each_method_decodes_by_its_own_attention(monkeypatch):
    seen = []
    original = decode_module.time_steps

    def time_steps(decode, *others):
        (cache,) = [cell.cell_contents for cell in decode.__closure__ if isinstance(cell.cell_contents, TidalCache)]
        before = cache.get_seq_length()
        found = original(decode, *others)
        seen.append((type(cache.attention).__name__, before, cache.get_seq_length() - before))
        return found

    monkeypatch.setattr(decode_module, "time_steps", time_steps)
    bench_decode(RandomModel("tiny"), replace(DECODE, contexts=(64, 40), budgets=(16,)), CPU, torch.float32)
    kinds = ["DecodeAttention", "SdpaAttention", "DecodeAttention", "QuestAttention", "StreamingAttention"]
    assert seen == [(kind, context, 2 * (5 + 2)) for context in (64, 40) for kind in kinds]


@pytest.mark.parametrize(
    ("module", "bench"),
    [
        (operations, lambda dtype: bench_operations(SETTINGS, CPU, dtype)),
        (decode_module, lambda dtype: bench_decode(RandomModel("tiny"), DECODE, CPU, dtype)),
    ],
)
def test_the_dtype_is_checked_first(module, bench, monkeypatch):
    def refuse(device, dtype):
        raise InputError(f"no {dtype}")

    monkeypatch.setattr(module, "check_dtype", refuse)
    monkeypatch.setattr(timing_report, "read_bandwidth_gbs", lambda device: 1 / 0)
    with pytest.raises(InputError, match="no torch.bfloat16"):
        bench(torch.bfloat16)


def test_the_base_is_the_faster_full_attention():
    row = DecodeRow(
        method="full", context=64, budget=None, step_ms=4.0, spread=0.0, floor_ms=1.0, over_floor=4.0,
        speedup_vs_full=None, kv_read_fraction=1.0, captured=True,
    )  # fmt: skip
    others = [row.model_copy(update={"method": name, "step_ms": ms}) for name, ms in (("sdpa", 3.0), ("tidal", 1.5))]
    rows = [row, *others]
    assert [row.speedup_vs_full for row in decode_module._with_speedups(rows)] == [0.75, 1.0, 2.0]
    assert [row.speedup_vs_full for row in decode_module._with_speedups(rows[2:])] == [None]


def test_sets_that_overlap_read_more_than_there_is():
    """A row of results all the same, which the report takes."""
    settings = replace(DECODE, contexts=(40,), budgets=(39,), methods=("tidal",))
    (row,) = bench_decode(RandomModel("tiny"), settings, CPU, torch.float32).to_json()["rows"]
    assert row["kv_read_fraction"] == pytest.approx((4 * 40 + 2 * 2 * 39) / (6 * 40), abs=1e-5)
    assert DecodeRow.model_validate(row).kv_read_fraction > 1


@pytest.mark.parametrize("method", TIMED_METHODS)
def test_every_method_decodes_through_the_cache(method):
    """With a budget of the whole context, the logits of full attention."""
    torch.manual_seed(0)
    model = apply(RandomModel("tiny").model(CPU, torch.float32), "paper")
    shape = model_shape(model.config)
    logits = []
    for name in ("full", method):
        cache = TidalCache(model.config, TidalPlan.paper(6), 64)
        cache.attention = step_attention(name, TidalPlan.paper(6), shape, 64, 33)
        cache.fill(2, 32, CPU, torch.float32, torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits.append(model(torch.tensor([[3], [7]]), past_key_values=cache).logits)
        assert cache.get_seq_length() == 33
    torch.testing.assert_close(logits[0], logits[1])
    assert logits[0].std() > 0


def test_sliding_windows_are_not_measured():
    class Gemma:
        name = "gemma"

        def config(self):
            return FAMILIES["gemma3_text"]()

    with pytest.raises(InputError, match="'gemma3_text' has layers with a sliding window"):
        bench_decode(Gemma(), DECODE, CPU, torch.float32)


def test_a_cache_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(timing_report, "read_bandwidth_gbs", lambda device: 1 / 0)
    settings = replace(DECODE, contexts=(100_000_000,))
    with pytest.raises(InputError, match=r"tiny, batch 1: \d+\.\d GiB of memory are needed, .*: lower --contexts"):
        bench_decode(RandomModel("tiny"), settings, CPU, torch.float32)


def test_memory_of_weights_and_cache():
    config = RandomModel("llama-3-8b").config()
    settings = DecodeSettings(contexts=(1000,), methods=("full",), steps=50)
    found = decode_module._memory(config, settings, torch.bfloat16)
    capacity = settings.capacity
    assert capacity == 1000 + 2 * (5 + 50)
    expected = 8_030_261_248 * 2 + 32 * 2 * capacity * 8 * 128 * 2 + 16 * 32 * capacity + 2**30
    assert found == expected
    assert decode_module._memory(config, replace(settings, methods=("quest",)), torch.bfloat16) > found


@pytest.mark.parametrize("name", CONFIGS)
def test_public_shapes(name):
    """Each one is a model that plans fit."""
    config = RandomModel(name).config()
    check_architecture(config)
    shape = model_shape(config)
    assert config.hidden_size in (shape.num_query_heads * shape.head_dim, 3072)
    plan = find_plan("paper", config)
    assert len(plan.roles) == shape.num_layers
    if name in ("llama-2-7b", "llama-3-8b", "llama-3.1-8b"):
        assert [layer for layer, role in enumerate(plan.roles) if role == "select"] == [2, 7 if "-2-" in name else 13]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360),
     ("mistral-7b", 7_248_023_552), ("llama-3.2-1b", 1_235_814_400), ("qwen2.5-7b", 7_615_616_512)],
)  # fmt: skip
def test_public_shapes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = RandomModel(name).model(torch.device("meta"), torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert model.dtype == torch.bfloat16


# ---- the command line

OPS = ["bench", "ops", "--device", "cpu", "--heads", "4", "--kv-heads", "2,4", "--head-dim", "8", "--layers", "3"]
OPS += ["--contexts", "24,40", "--budgets", "8,0.5"]
DECODE_CLI = ["bench", "decode", "--device", "cpu", "--config", "tiny", "--contexts", "40,64", "--budgets", "16"]
DECODE_CLI += ["--steps", "2"]


def test_bench_ops_from_the_command_line(run, tmp_path):
    status, out, err = run(
        *OPS, "--json", "--results", str(tmp_path / "ops.json"), "--output", str(tmp_path / "figures"), "--seed", "3"
    )
    assert status == 0
    answer = json.loads(out)
    assert json.loads((tmp_path / "ops.json").read_text()) == answer
    assert {(row["kv_heads"], row["context"]) for row in answer["rows"]} == {(2, 24), (2, 40), (4, 24), (4, 40)}
    assert answer["command"].startswith("tidaldecode bench ops --device cpu")
    assert (answer["dtype"], answer["layers"]) == ("float32", 3)
    assert "4 query heads, 2 KV heads, batch 1, 40 tokens" in err
    assert "step tidal unified" in err
    assert is_png(tmp_path / "figures" / "bench-ops.png")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bench-ops.png", "figures", "ops.json"]


def test_bench_decode_from_the_command_line(run, tmp_path):
    options = ["--methods", "full,tidal,quest", "--batch", "2", "--dtype", "bfloat16"]
    figure, results = tmp_path / "d.PNG", tmp_path / "d.json"
    status, out, err = run(*DECODE_CLI, *options, "--json", "--results", str(results), "--output", str(figure))
    assert status == 0
    answer = json.loads(out)
    assert json.loads(results.read_text()) == answer
    assert [(row["method"], row["context"]) for row in answer["rows"]] == [
        (method, context) for context in (40, 64) for method in ("full", "tidal", "quest")
    ]
    assert (answer["model"], answer["plan"], answer["batch"], answer["dtype"]) == ("tiny", "paper", 2, "bfloat16")
    assert "tiny, batch 2" in err and "did not run in a CUDA graph" in err
    assert is_png(figure)


def test_bench_decode_of_a_model(run, tiny_folder, tmp_path):
    """Behind a text, or random K and V; rows say which."""
    (tmp_path / "text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 2)
    options = ["--model", str(tiny_folder), "--contexts", "40", "--budgets", "16", "--steps", "2", "--methods", "tidal"]
    for more, kv in ((["--text", str(tmp_path / "text.txt"), "--batch", "2"], "text"), (["--kv", "random"], "random")):
        status, out, err = run("bench", "decode", "--device", "cpu", *options, *more, "--json")
        answer = json.loads(out)
        assert status == 0
        assert answer["model"] == str(tiny_folder)
        assert [(r["method"], r["speedup_vs_full"], r["kv"]) for r in answer["rows"]] == [("tidal", None, kv)]
        assert f"{kv} K and V" in err
    for more, words in (
        (["--contexts", "400"], ["the text has 128 tokens, 273 too few for a context of 401"]),
        (["--contexts", "600"], ["a context of 600 tokens is beyond the model's 512 positions"]),
        (["--kv", "random"], ["--kv random reads no text: leave out --text"]),
        (["--model", "x", "--text", "nowhere.txt"], ["text file nowhere.txt does not exist"]),
    ):
        result = run("bench", "decode", "--device", "cpu", *options, "--text", str(tmp_path / "text.txt"), *more)
        assert_one_line(result, *words)


def test_k_and_v_of_a_text(tiny):
    """What prefill leaves of each sequence's window, also after steps behind a shorter context wrote over them."""
    model = apply(tiny("llama"), "full")
    windows = torch.randint(2, 250, (2, 31), generator=torch.Generator().manual_seed(1))
    windows_of_all = windows[[0, 1, 0]]
    expected = TidalCache(model.config, "full", 40)
    with torch.no_grad():
        model(windows_of_all[:, :30], past_key_values=expected)
        cache, filling = TidalCache(model.config, "full", 40), TextKV(model, windows, batch=3, steps=10)
        for context in (30, 12, 20, 30):
            token = filling.fill(cache, context)
            assert torch.equal(token, windows_of_all[:, context : context + 1])
            assert cache.get_seq_length() == context and cache.sequences.lengths.tolist() == [context] * 3
            for mine, theirs in zip(cache.layers, expected.layers, strict=True):
                torch.testing.assert_close(mine.keys[:, :, :context], theirs.keys[:, :, :context])
                torch.testing.assert_close(mine.values[:, :, :context], theirs.values[:, :, :context])
            for _ in range(10):
                token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)


def test_codes_are_those_of_the_texts_keys(tiny):
    """Also of rows that steps wrote over, and of a longer context after a shorter one."""
    model = apply(tiny(), "full")
    roles = ("quantized_select",) * model.config.num_hidden_layers
    plan = TidalPlan(roles=roles, selection="unified", token_budget=8, key_bits=2)
    windows = torch.randint(2, 200, (2, 31))
    cache, filling = TidalCache(model.config, plan, 40), TextKV(model, windows, batch=3, steps=5)
    with torch.no_grad():
        for context in (12, 30, 20):
            token = filling.fill(cache, context)
            for layer in cache.layers:
                fresh = room_for_codes(layer.keys.transpose(1, 2), 2, layer.steady)
                lengths = cache.sequences.lengths
                ops.write_codes(replace(layer.kv(), codes=fresh), lengths, 3 * context)
                assert torch.equal(layer.codes.packed[:, :context], fresh.packed[:, :context])
                assert torch.equal(layer.codes.factors[:, :context], fresh.factors[:, :context])
            for _ in range(5):
                token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)


def test_windows_are_spread_over_a_text():
    text = Text(torch.arange(100, dtype=torch.int32))
    assert [window[0].item() for window in text.spread(40, 4)] == [0, 20, 40, 60]
    assert text.spread(100, 1).shape == (1, 100)
    assert Text(text.tokens, prefix=(7,)).spread(41, 2)[1, :2].tolist() == [7, 60]


def test_tables_without_json(run):
    status, out, err = run(*DECODE_CLI, "--methods", "sdpa")
    assert (status, out) == (0, "")
    assert "memory is read at" in err


def test_a_stopped_run_keeps_its_rows(run, tmp_path, monkeypatch):
    original = LayerCaches.random

    def random(shape, *others):
        if (shape.kv_heads, shape.context) == (4, 24):
            raise KeyboardInterrupt
        return original(shape, *others)

    monkeypatch.setattr(LayerCaches, "random", random)
    results = tmp_path / "ops.json"
    results.write_text("{}")
    status, _, err = run(*OPS, "--results", str(results))
    assert (status, err.splitlines()[-1]) == (130, "tidaldecode: stopped")
    rows = json.loads(results.read_text())["rows"]
    assert list(dict.fromkeys((row["kv_heads"], row["context"]) for row in rows)) == [(2, 24), (2, 40)]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 10_000


def test_plots_show_every_line(tmp_path):
    """Also of one context, of budgets that are fractions, and with FlashInfer."""
    from matplotlib.figure import Figure

    from tidaldecode.report import speeds
    from tidaldecode.report.drawing import save_png

    rows = [
        {"operation": name, "kv_heads": 2, "heads": 4, "batch": 1, "context": context, "budget": budget, "us": us}
        for context in (64, 128)
        for name, budget, us in [
            ("flashinfer", None, 8.0), ("sparse unified", 8, 2.0), ("sparse unified", 0.5, 3.0),
            ("step full (sdpa)", None, 90.0), ("selection unified", 8, 1.0),
        ]
    ]  # fmt: skip
    kept = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        kept.append(figure)
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        save_png(speeds.operation_times, {"rows": rows, "layers": 3}, tmp_path / "a.png", "x, y")
    steps, layer = kept[0].axes
    assert [line.get_label() for line in steps.lines] == ["step full (sdpa)"]
    assert [line.get_label() for line in layer.lines] == [
        "flashinfer", "sparse unified, 8", "sparse unified, 50\N{NO-BREAK SPACE}%"
    ]  # fmt: skip
    assert layer.lines[1].get_xydata().tolist() == [[64, 2], [128, 2]]
    assert math.isclose(layer.get_xticks()[0], 64)


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("ops", ["--contexts", "many"], ["--contexts 'many'", "1024,4096"]),
        ("ops", ["--contexts", "1024,"], ["--contexts '1024,'"]),
        ("ops", ["--contexts", "1024,0"], ["--contexts 0 must be positive"]),
        ("ops", ["--budgets", "64,-1"], ["--budgets -1 must be positive"]),
        ("ops", ["--budgets", "64,2.5"], ["--budgets 2.5", "(0, 1]"]),
        ("ops", ["--budgets", "x"], ["--budgets 'x' is no number"]),
        ("ops", ["--kv-heads", "8,5"], ["32 query heads are no multiple of 5 KV heads"]),
        ("ops", ["--heads", "0"], ["--heads"]),
        ("ops", ["--head-dim", "0"], ["--head-dim"]),
        ("ops", ["--batch", "0"], ["--batch"]),
        ("ops", ["--layers", "2"], ["--layers"]),
        ("ops", ["--dtype", "int8"], ["int8"]),
        ("ops", ["--device", "cuda:9"], ["--device cuda:9: PyTorch sees"]),
        ("ops", ["--contexts", "100000000000"], ["100000000000 tokens", "GiB of memory are needed"]),
        ("ops", ["--results", "nowhere/ops.json"], ["--results nowhere/ops.json", "nowhere does not exist"]),
        ("ops", ["--results", "."], ["--results . is a folder"]),
        ("ops", ["--output", "nowhere/ops.png"], ["--output nowhere/ops.png", "nowhere does not exist"]),
        ("ops", ["--output", "/dev/null/figures"], ["--output /dev/null/figures"]),
        ("decode", ["--config", "llama-9"], ["no config 'llama-9'", "llama-3-8b"]),
        ("decode", ["--config", "tiny", "--model", "smollm2-135m"], ["either --config or --model"]),
        ("decode", ["--config", "tiny", "--kv", "text"], ["--config has random weights, which read no text"]),
        ("decode", ["--methods", "full,magic"], ["--methods 'magic' is unknown", "streaming"]),
        ("decode", ["--methods", ""], ["--methods '' is unknown"]),
        ("decode", ["--contexts", "-5"], ["--contexts -5 must be positive"]),
        ("decode", ["--budgets", "1"], ["token_budget: 1 is below"]),
        ("decode", ["--steps", "0"], ["--steps"]),
        ("decode", ["--plan", "nonsense"], ["no plan 'nonsense'"]),
        ("decode", ["--config", "llama-3-8b", "--plan", "smollm2-135m"], ["made for another model"]),
        ("decode", ["--model", "./nowhere"], ["model folder ./nowhere does not exist"]),
        ("decode", ["--contexts", "10000000000"], ["llama-3-8b, batch 1", "GiB of memory are needed", "--batch"]),
    ],
)
def test_bad_options(run, command, options, words, monkeypatch):
    """Found before anything is measured or made."""
    monkeypatch.setattr(timing_report, "read_bandwidth_gbs", lambda device: 1 / 0)
    device = [] if "--device" in options else ["--device", "cpu"]
    assert_one_line(run("bench", command, *device, *options), *words)


@pytest.mark.parametrize("command", ["ops", "decode"])
def test_no_gpu(run, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "no CUDA GPU here: `tidaldecode bench` measures GPUs; --device cpu runs it anyway, with small sizes"
    assert_one_line(run("bench", command), message)


def test_no_matplotlib(run, tmp_path, monkeypatch):
    from tidaldecode.report import drawing

    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    result = run(*OPS, "--output", str(tmp_path / "x.png"))
    assert_one_line(result, "plots need matplotlib: pip install 'tidaldecode[plot]'")
    assert not list(tmp_path.iterdir())


def test_help(run):
    for options in (["bench", "--help"], ["bench", "ops", "--help"], ["bench", "decode", "--help"]):
        status, out, _ = run(*options)
        assert status == 0
        assert "Usage" in out
