"""What of the vLLM wing runs without vLLM: the split of a batch, the settings, refusals, ranks, and what is counted."""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from tidaldecode import InputError, ModelShape, TidalPlan, ops
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.ops import KV, rounds
from tidaldecode.ops.codes import room_for_codes
from tidaldecode.serving.batch import split
from tidaldecode.serving.gpu import check_kernels, memory_left
from tidaldecode.serving.rank import Limits, RankAttention
from tidaldecode.serving.read_counts import ReadCounts
from tidaldecode.serving.settings import Settings
from tidaldecode.vllm import register
from tidaldecode.vllm.support import check_engine, check_layer, check_room

SHAPE = ModelShape(num_layers=6, num_query_heads=8, num_kv_heads=4, head_dim=16)
ROLES = ("full", "select", "sparse", "select", "sparse", "sparse")
LIMITS = Limits(context=64, requests=4, tokens=8)


def _array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# ---- batches


def test_requests_that_decode_come_first_then_prompts():
    # two that decode; the middle of a prompt; a whole one
    parts = split(_array(0, 1, 2, 6, 9), _array(9, 5, 8, 3), _array(6, 4, 10, 3), 99)
    assert (parts.tokens, parts.requests) == (slice(0, 2), slice(0, 2))
    assert parts.lengths.tolist() == [9, 5]
    assert parts.first_prompt == 2


def test_generated_tokens_behind_a_prompt_are_decoded():
    # a generated token; a first chunk; a resumed request of 3 prompt tokens, 2 generated ones; padding
    parts = split(_array(0, 1, 5, 10, 10), _array(9, 4, 5, 0), _array(6, 7, 3, 0), 99)
    assert parts.tokens.tolist() == [0, 8, 9]
    assert parts.requests.tolist() == [0, 2, 2]
    assert parts.lengths.tolist() == [9, 4, 5]
    assert parts.first_prompt == 1


def test_the_last_token_of_a_prompt_is_no_decoded_one():
    parts = split(_array(0, 1, 2), _array(7, 8), _array(7, 7), 99)
    assert parts.tokens.tolist() == [1]
    assert parts.first_prompt == 0


def test_without_prompts_nothing_is_read_in_full():
    # resumed, a chunk of generated tokens alone
    parts = split(_array(0, 1, 4), _array(7, 8), _array(5, 4), 99)
    assert parts.tokens.tolist() == [0, 1, 2, 3]
    assert parts.lengths.tolist() == [7, 6, 7, 8]
    assert parts.first_prompt == 2


def test_what_is_too_much_to_decode_at_once_is_read_in_full():
    # one that generates, and resumed with 5 and 2 generated tokens
    parts = split(_array(0, 1, 7, 10), _array(9, 6, 3), _array(4, 1, 1), 4)
    assert parts.requests.tolist() == [0, 2, 2]
    assert parts.first_prompt == 1


# ---- settings and refusals


def _config() -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, hidden_size=128)


def test_settings_come_from_the_config_or_else_from_the_environment(monkeypatch, tmp_path):
    path = tmp_path / "plan.json"
    TidalPlan.validated(roles=ROLES, selection="unified", token_budget=64).save(path)
    monkeypatch.setenv("TIDALDECODE_PLAN", "paper")
    monkeypatch.setenv("TIDALDECODE_BUDGET", "32")
    assert Settings.of({}).plan_for(_config()).name == "paper"
    assert Settings.of({}).plan_for(_config()).token_budget == 32
    given = Settings.of({"tidaldecode": {"plan": str(path), "token_budget": 0.25}})
    assert given.plan_for(_config()).roles == ROLES
    assert given.plan_for(_config()).token_budget == 0.25
    assert Settings.of({"tidaldecode": str(path)}).plan_for(_config()).token_budget == 32


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"plans": "paper"}, "plans: unknown setting; there are plan, token_budget, vllm_attention"),
        ({"token_budget": "many"}, "'tidaldecode': token_budget"),
        ({"plan": "papre"}, "papre"),
        ({"plan": "smollm2-135m"}, "30 layers"),
        ({"plan": "paper", "token_budget": 1}, "token_budget: 1"),
        ([1], r"give an object such as .*, not \[1\]"),
    ],
)
def test_wrong_settings_are_told_in_one_line(given, words):
    with pytest.raises(InputError, match=words) as caught:
        Settings.of({"tidaldecode": given}).plan_for(_config())
    assert "\n" not in str(caught.value)


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("TIDALDECODE_BUDGET", "many")
    with pytest.raises(InputError, match="^TIDALDECODE_BUDGET: "):
        Settings.of({})
    assert Settings.of({"tidaldecode": {"token_budget": 9}}).token_budget == 9


def _engine(**changes: object) -> SimpleNamespace:
    parallel = {
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "use_ubatching": False,
    }
    model = {"use_mla": False, "rswa_window": None}
    config = {"speculative_config": None}
    for part in (parallel, model, config):
        part.update({name: value for name, value in changes.items() if name in part})
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), model_config=SimpleNamespace(**model), **config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"use_ubatching": True}, "dual-batch overlap"),
        ({"use_mla": True}, "MLA"),
        ({"rswa_window": 128}, "sliding window"),
    ],
)
def test_engines_that_tidaldecode_can_not_work_with_are_refused(change, words):
    check_engine(_engine())
    with pytest.raises(InputError, match=words) as caught:
        check_engine(_engine(**change))
    assert "\n" not in str(caught.value)


def test_batch_invariance_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    check_engine(_engine())
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(InputError, match="VLLM_BATCH_INVARIANT=1, .*: unset it") as caught:
        check_engine(_engine())
    assert "\n" not in str(caught.value)


def test_too_many_requests_for_the_memory_are_refused():
    check_room(RankAttention(_plan("unified"), SHAPE, _alone(), LIMITS), 2**30)
    attention = RankAttention(_plan("per_head"), SHAPE, _alone(), LIMITS)
    with pytest.raises(InputError, match="--max-num-seqs 4 requests need .* GiB are left: lower --max-num-seqs"):
        check_room(attention, 1000)
    attention.kept_bytes, attention.step_bytes = 256 * 128 * 1024 * 4, 2**29
    with pytest.raises(InputError, match=r"need 0\.1 GiB, a step 0\.5 GiB more, and 0\.5 GiB are left") as caught:
        check_room(attention, 2**29)
    assert "\n" not in str(caught.value)
    check_room(attention, attention.kept_bytes + 2**29)
    check_room(attention, None)


def test_memory_that_is_left_goes_by_vllms_share(monkeypatch):
    assert memory_left(torch.device("cpu"), 0.9) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert memory_left(torch.device("cuda"), 0.9) == 300 - 100 + 20


def test_layers_that_our_kernels_do_not_have_are_refused():
    layer = {"kv_cache_dtype": "auto", "attn_type": "decoder", "alibi_slopes": None}
    check_layer(layer)
    for change, words in (
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"alibi_slopes": [0.5]}, "with ALiBi"),
    ):
        with pytest.raises(InputError, match=words):
            check_layer(layer | change)


def test_a_gpu_without_kernels_is_refused(monkeypatch):
    check_kernels(torch.device("cpu"), torch.float64, 999)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(InputError, match="Tesla T4 is too old"):
        check_kernels(torch.device("cuda", 0), torch.float16, 128)


def test_a_vllm_without_its_registry_is_no_error(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert "can't register" in caplog.text


# ---- ranks


class _Ranks:
    """Ranks as threads of this process, which wait for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._parts: list[torch.Tensor | None] = [None] * size

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._parts[rank] = tensor.clone()
        self._barrier.wait(30)
        everyone = list(self._parts)
        self._barrier.wait(30)
        return everyone

    def group(self, rank: int) -> SimpleNamespace:
        return SimpleNamespace(
            rank_in_group=rank,
            world_size=self.size,
            all_reduce=lambda tensor: sum(self.exchange(rank, tensor)),
            all_gather=lambda tensor, dim: torch.cat(self.exchange(rank, tensor), dim),
        )


def _alone() -> SimpleNamespace:
    return _Ranks(1).group(0)


def _plan(
    selection: str, sources: dict[int, list[str]] | None = None, roles: tuple[str, ...] = ROLES, bits: int | None = None
) -> TidalPlan:
    return TidalPlan.validated(
        roles=roles,
        selection=selection,
        token_budget=16,
        sink_tokens=1,
        recent_tokens=2,
        sources=sources,
        key_bits=bits,
    )


CODED = ("full", "quantized_select", "sparse", "select", "sparse", "quantized_select")


ELSEWHERE = {2: [f"1:per_head:{7 - head}" for head in range(8)], 5: ["1:per_group:3"] * 4 + ["3:unified"] * 4}


def _step(attention: DecodeAttention, cache: list[tuple], query: list[torch.Tensor], table, lengths) -> list:
    attention.begin(lengths, 64)
    part = slice(attention.heads.start, attention.heads.stop)
    of_kv = slice(part.start // SHAPE.group_size, -(-part.stop // SHAPE.group_size))
    outputs = []
    for layer in range(SHAPE.num_layers):
        kv = KV(*(rows[:, :, of_kv] for rows in cache[layer]), table, lengths)
        if bits := attention.code_bits(layer):
            kv = replace(kv, codes=room_for_codes(kv.k, bits))
            ops.write_codes(kv, lengths, int(lengths.sum()))
        outputs.append(attention.attend(layer, query[layer][:, part], kv, 0.25))
    return outputs


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "plan",
    [
        _plan("unified"),
        _plan("per_head"),
        _plan("per_group"),
        _plan("per_head", ELSEWHERE),
        _plan("unified", roles=CODED, bits=2),
        _plan("per_head", ELSEWHERE, CODED, 4),
    ],
    ids=lambda plan: f"{plan.selection}-{plan.sources is not None}-{plan.key_bits}",
)
def test_ranks_attend_as_one_does(size, plan, monkeypatch):
    monkeypatch.setattr("tidaldecode.serving.rank._SCORE_BYTES", 4 * 2 * 64 * 4)  # some sequences at a time
    monkeypatch.setattr("tidaldecode.serving.rank._ROWS", 2)
    torch.manual_seed(0)
    lengths = torch.tensor([40, 7, 64, 33, 16], dtype=torch.int32)
    blocks, table = 20, torch.randperm(20, dtype=torch.int32).view(5, 4)
    cache = [tuple(torch.randn(blocks, 16, 4, 16, dtype=torch.float64) for _ in range(2)) for _ in range(6)]
    query = [torch.randn(5, 8, 16, dtype=torch.float64) * 3 for _ in range(6)]
    expected = _step(DecodeAttention(plan, SHAPE), cache, query, table, lengths)

    ranks = _Ranks(size)
    outputs: dict[int, list] = {}

    def run(rank: int) -> None:
        # more sequences than there is room for, too
        attention = RankAttention(plan, SHAPE, ranks.group(rank), Limits(64, 3 if rank else 8, 8))
        attention.reserve(torch.device("cpu"))
        outputs[rank] = _step(attention, cache, query, table, lengths)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for layer in range(SHAPE.num_layers):
        together = torch.cat([outputs[rank][layer] for rank in range(size)], dim=1)
        torch.testing.assert_close(together, expected[layer])


def test_what_ranks_add_up_is_as_long_as_the_longest_sequence():
    shapes = []

    def all_reduce(importance: torch.Tensor) -> torch.Tensor:
        shapes.append(importance.shape)
        return 2 * importance

    group = SimpleNamespace(rank_in_group=0, world_size=2, all_reduce=all_reduce)
    attention = RankAttention(_plan("unified"), SHAPE, group, Limits(10**6, 2, 8))
    attention.reserve(torch.device("cpu"))
    lengths = torch.tensor([30, 40], dtype=torch.int32)
    cache = torch.randn(2, 4, 16, 2, 16)
    table = torch.arange(4, dtype=torch.int32).view(2, 2) % 2
    attention.begin(lengths, 40)
    attention.attend(1, torch.randn(2, 4, 16), KV(*cache, table, lengths * 0 + 32), 0.25)
    assert shapes == [(2, 1, 40)]


def test_only_sets_that_other_ranks_read_are_exchanged():
    def exchanged(plan: TidalPlan) -> set[int]:
        return RankAttention(plan, SHAPE, _Ranks(2).group(0), LIMITS)._exchanges

    assert exchanged(_plan("unified")) == set()
    assert exchanged(_plan("per_head")) == set()
    assert exchanged(_plan("per_head", ELSEWHERE)) == {1}


def test_kv_heads_on_several_ranks_can_not_choose_per_group():
    RankAttention(_plan("per_head"), SHAPE, _Ranks(8).group(0), LIMITS)
    with pytest.raises(InputError, match="per KV head"):
        RankAttention(_plan("per_group"), SHAPE, _Ranks(8).group(0), LIMITS)


@pytest.mark.parametrize(
    ("role", "selection", "token_bytes"),
    [  # scores of 4 heads of 8 KV heads, what counts them, and 14 bytes for each set
        ("quantized_select", "per_group", 8 * (4 * 2 + 1) + 8 * 14),
        ("quantized_select", "per_head", 8 * (4 * 2 + 1) + 32 * 14),
        ("quantized_select", "unified", 8 * (4 * 2 + 1) + 14),
        ("select", "per_group", 8 * (4 * 4 + 1) + 8 * 14),
        ("select", "per_head", 8 * (4 * 4 + 1) + 32 * 14),
    ],
)
@pytest.mark.parametrize("requests", [1, 4, 256])
def test_a_step_asks_for_what_lies_between_scores_and_sets(role, selection, token_bytes, requests):
    """Of Llama 3.1 8B at 131,072 tokens."""
    plan = TidalPlan.validated(
        roles=("full", role, *["sparse"] * 30),
        selection=selection,
        token_budget=4096,
        key_bits=2 if role == "quantized_select" else None,
    )
    shape = ModelShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)
    attention = RankAttention(plan, shape, _alone(), Limits(131_072, requests, requests))
    of_one = 131_072 * token_bytes
    assert attention.step_bytes == min(2**29 + of_one, requests * of_one)
    more = RankAttention(plan, shape, _alone(), Limits(131_072, requests, 1000))
    rows = min(more.most_rows, 1000)
    table = rows * shape.num_sets(selection) * 4096 * 4 if rows > requests else 0
    assert more.step_bytes == table + min(2**29 + of_one, rows * of_one)
    numbers = 1, -(-requests // 2), requests
    taken = [rounds.rounds_for(batch, 131_072, shape.num_sets(selection), token_bytes) for batch in numbers]
    taken = [each.chunks * each.tokens * token_bytes for each in taken]
    assert 0.9 * attention.step_bytes < max(taken) <= attention.step_bytes


@pytest.mark.parametrize("role", ["select", "quantized_select"])
def test_ranks_that_add_up_ask_for_importances_and_their_sum(role):
    plan = TidalPlan.validated(
        roles=("full", role, *["sparse"] * 30),
        selection="unified",
        token_budget=4096,
        key_bits=2 if role == "quantized_select" else None,
    )
    shape = ModelShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)
    for requests in (4, 2000):
        attention = RankAttention(plan, shape, _Ranks(2).group(0), Limits(131_072, requests, requests))
        rows = min(requests, 512)
        importance = min(rows * 131_072 * 4, 2**29)
        of_one = [131_072 * each for each in (14, 4 * (9 if role == "quantized_select" else 17))]
        lists, scores = (min(rows * each, 2**29 + each) for each in of_one)
        assert attention.step_bytes == importance + max(scores, importance + lists)


def test_room_stays_where_it_is():
    attention = RankAttention(_plan("unified"), SHAPE, _alone(), LIMITS)
    attention.reserve(torch.device("cpu"))
    attention.begin(torch.tensor([9, 30], dtype=torch.int32))
    assert attention.counts.tolist() == [9, 16]
    address = attention.indices.data_ptr()
    attention.begin(torch.full((6,), 20, dtype=torch.int32))
    assert attention.indices.data_ptr() != address
    attention.begin(torch.full((4,), 20, dtype=torch.int32))
    assert attention.indices.data_ptr() == address


# ---- what is counted


def test_read_counts_agree_with_the_plan():
    attention = DecodeAttention(_plan("per_head", ELSEWHERE), SHAPE)
    counts = ReadCounts(attention)
    assert math.isnan(counts.fraction)
    counts.count(_array(12, 40, 0, 50))
    read = sum(sum(attention.tokens_read(length).values()) for length in (12, 40, 50))
    assert counts.totals.tolist() == [3, read, 6 * (12 + 40 + 50)]


def test_read_counts_count_the_bytes_of_codes():
    attention = DecodeAttention(_plan("per_group", roles=CODED, bits=2), SHAPE)
    counts = ReadCounts(attention)
    counts.count(_array(12, 40, 50))
    read = sum(sum(attention.tokens_read(length).values()) for length in (12, 40, 50))
    assert counts.totals[1] == pytest.approx(read)
    assert attention.tokens_read(40)[1] == 16 + 40 * (16 * 2 / 8 + 2) / 64


def test_read_counts_of_a_share_of_the_context():
    plan = TidalPlan.validated(roles=ROLES, selection="unified", token_budget=0.25)
    attention = DecodeAttention(plan, SHAPE)
    counts = ReadCounts(attention)
    counts.count(_array(100))
    assert counts.fraction == pytest.approx(attention.kv_read_fraction(100))
