"""Codes of keys: what they estimate, how they are kept, and the kernels against the reference."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tidaldecode import InputError, Source, TidalCache, TidalPlan, apply, remove
from tidaldecode.errors import MemoryShortError
from tidaldecode.evaluate.scoring import step_logits
from tidaldecode.hf.layers import TidalLayer, check_codes
from tidaldecode.hf.sequences import Sequences
from tidaldecode.methods.method import Method
from tidaldecode.ops import KV, Choice, KeyCodes, codes, reference, rounds
from tidaldecode.ops.codes import CENTRE_TOKENS, decode, encode, room_for_codes, rotation
from tidaldecode.rules import RULES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (161, 1, 64, 0)
LARGE = [(bits, dim, 8, 2, 16) for bits in (1, 2) for dim in (96, 128, 256)] * torch.cuda.is_available()
SHAPE = {"num_query_heads": 6, "num_kv_heads": 2}


def make(bits, dim=32, heads=6, kv_heads=3, block_size=16, dtype=torch.float32, lengths=LENGTHS):
    """A paged cache with keys about a mean, a query that goes with some of them, and room for codes."""
    torch.manual_seed(0)
    batch, blocks = len(lengths), -(-max(lengths) // block_size)
    table = torch.randperm(batch * blocks)[: batch * blocks].view(batch, blocks).int()
    keys = torch.randn(batch, max(lengths), kv_heads, dim) + 2 * torch.randn(kv_heads, dim)
    k = torch.zeros(batch * blocks, block_size, kv_heads, dim, dtype=dtype, device=DEVICE)
    kv = KV(k, torch.zeros_like(k), table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    steady = (torch.arange(dim, device=DEVICE) % 3 > 0).float()
    codes = room_for_codes(k, bits, steady)
    kv = replace(kv, codes=codes)
    query = torch.randn(batch, heads, dim).to(dtype).to(DEVICE)
    return query, keys.to(dtype).to(DEVICE), kv, codes


def padded(keys, lengths):
    """The last `length` keys of each row are a sequence's, as a left-padded batch."""
    return keys[:, -max(lengths) :], torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def write(keys, kv):
    rows, new = padded(keys, LENGTHS)
    reference.write_kv(rows, rows, kv, new)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.85), (2, 0.4), (4, 0.13)])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_estimates_are_unbiased_and_as_near_as_their_bits(bits, error, dim):
    torch.manual_seed(0)
    keys, query = torch.randn(4000, 2, dim) + 3 * torch.randn(2, dim), torch.randn(2, dim)
    centre = keys.mean(0)
    packed, factors = encode(keys, centre, room_for_codes(keys[None], bits))
    assert packed.shape == (4000, 2, dim * bits // 8)
    estimated = (decode(packed, factors, bits) * (query @ rotation(dim, keys.device))).sum(-1)
    exact = ((keys - centre) * query).sum(-1)
    assert (estimated - exact).std() < error * exact.std()
    assert abs((estimated * exact).sum() / exact.square().sum() - 1) < 0.1


def test_the_rotation_is_one_and_always_the_same():
    turn = rotation(64, torch.device("cpu"))
    torch.testing.assert_close(turn @ turn.T, torch.eye(64), rtol=0, atol=1e-5)
    rotation.cache_clear()
    assert torch.equal(turn, rotation(64, torch.device("cpu")))


def test_a_key_at_the_centre_scores_nothing():
    keys = torch.ones(1, 1, 2, 8)
    packed, factors = encode(keys, keys[0, 0], room_for_codes(keys, 1))
    assert not decode(packed, factors, 1).any()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_of_a_prompt_and_of_steps_are_those_of_all_tokens(bits):
    _, keys, kv, codes = make(bits)
    rows, new = padded(keys, LENGTHS)
    reference.write_kv(rows, rows, kv, new)
    once = codes.packed.clone(), codes.factors.clone()
    codes.packed.zero_(), codes.factors.zero_()
    before = replace(kv, lengths=(kv.lengths - 1).clamp(min=0))
    reference.write_kv(rows[:, :-1], rows[:, :-1], before, before.lengths)
    reference.write_kv(rows[:, -1:], rows[:, -1:], kv, kv.lengths - before.lengths)
    assert torch.equal(codes.packed, once[0]) and torch.equal(codes.factors, once[1])


@pytest.mark.parametrize("rule", ["unified", "per_group", "per_head"])
def test_the_choice_is_that_of_the_estimated_scores(rule):
    query, keys, kv, _ = make(4)
    write(keys, kv)
    sets = {"unified": 1, "per_group": 3, "per_head": 6}[rule]
    indices = torch.full((len(LENGTHS), sets, 24), -1, dtype=torch.int32, device=DEVICE)
    choice = Choice.alike(kv.lengths, 24, recent=3, sinks=2)
    reference.choose_by_codes(query, kv, 0.2, [rule], choice, 200, indices)
    exact = torch.einsum("bhd,bthd->bht", query.float(), keys.float().repeat_interleave(2, 2)) * 0.2  # [B, Hq, T]
    exact = exact.softmax(-1).view(len(LENGTHS), sets, -1, keys.shape[1]).mean(2)
    chosen = indices[0].long()
    assert all(set(row.tolist()) >= {0, 1, 158, 159, 160} and len(set(row.tolist())) == 24 for row in chosen)
    best = exact[0].topk(24).values.sum(-1)
    assert (exact[0].gather(-1, chosen).sum(-1) > 0.8 * best).all()  # four bits choose nearly what scores do
    assert sorted(indices[1, 0, :1].tolist()) == [0]


def test_what_can_not_be_is_refused():
    k = torch.zeros(2, 4, 2, 20)
    for bits in (1, 3, 8):
        with pytest.raises(ValueError, match=f"there are no codes of {bits} bits for head dim 20"):
            room_for_codes(k, bits)
    room = room_for_codes(k, 2)
    with pytest.raises(ValueError, match="factors is"):
        KeyCodes(room.packed, room.factors.float(), room.rotation, room.steady)


PROMPTS = torch.randint(0, 250, (2, 60), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(PROMPTS)
MASK[1, :9] = 0


def plan_of(config, bits, budget=16):
    """Every layer but the first chooses by codes."""
    roles = ("full", *["quantized_select"] * (config.num_hidden_layers - 1))
    return TidalPlan(roles=roles, selection="per_group", token_budget=budget, key_bits=bits)


def filled(model, bits, tokens=60, capacity=64):
    """A cache of two prompts of different lengths."""
    cache = TidalCache(model.config, plan_of(model.config, bits), capacity)
    model(PROMPTS[:, :tokens], attention_mask=MASK[:, :tokens], past_key_values=cache)
    return cache


def coded(cache):
    """Every layer's codes of the tokens that are there, [B, T, ...]."""
    lengths = cache.sequences.lengths
    there = torch.arange(cache.capacity) < lengths[:, None]
    return [None if layer.codes is None else layer.codes.packed[there] for layer in cache.layers]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_cache_keeps_codes_of_what_it_holds(tiny, bits):
    """Of a prompt in chunks, of steps, after growth, crop, reorder and another attention."""
    model = apply(tiny("llama"), "full")
    cache = filled(model, bits)
    assert cache.layers[0].codes is None and all(layer.codes is not None for layer in cache.layers[1:])
    for _ in range(8):  # past the capacity
        model(PROMPTS[:, :1], past_key_values=cache)
    assert cache.capacity > 64
    for layer in cache.layers[1:]:
        keys = layer.keys.transpose(1, 2)
        packed, _ = encode(keys, keys[:, :CENTRE_TOKENS].mean(1, keepdim=True) * layer.codes.steady, layer.codes)
        there = torch.arange(cache.capacity) < cache.sequences.lengths[:, None]
        assert (packed[there] != layer.codes.packed[there]).float().mean() < 1e-3
    before, length = coded(cache), cache.get_seq_length()
    model(PROMPTS[:, :3], past_key_values=cache)  # a next turn is coded as it is written
    cache.crop(length - cache.get_seq_length())
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before, coded(cache), strict=True))
    cache.use_plan("full")
    assert coded(cache) == [None] * len(cache.layers)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_budget_of_the_whole_context_is_full_attention(tiny, bits):
    model = apply(tiny("llama"), "full")
    cache = filled(model, bits)
    cache.use_plan(plan_of(model.config, bits, 100))
    full = filled(model, bits)
    full.use_plan("full")
    for _ in range(3):
        logits = [model(PROMPTS[:, 7:8], past_key_values=each).logits for each in (cache, full)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("bits", "dim", "heads", "kv_heads", "block_size"),
    [(1, 32, 6, 3, 16), (2, 20, 5, 1, 256), (4, 16, 2, 2, 16), (1, 64, 7, 1, 16), *LARGE],
)
def test_kernels_write_the_references_codes(bits, dim, heads, kv_heads, block_size):
    pytest.importorskip("triton")
    from tidaldecode.ops import kernels

    _, keys, kv, codes = make(bits, dim, heads, kv_heads, block_size)
    rows, new = padded(keys, LENGTHS)
    reference.write_kv(rows, rows, kv, new)
    wanted = codes.packed.clone(), codes.factors.clone()
    codes.packed.zero_(), codes.factors.zero_()
    kernels.write_kv(rows, rows, kv, new)
    bits_apart = (codes.packed ^ wanted[0]).float().count_nonzero() / codes.packed.numel()
    assert bits_apart < 0.01  # sums in another order, at the border of two codes
    torch.testing.assert_close(codes.factors, wanted[1], rtol=1e-2, atol=1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize(("bits", "dim", "kv_heads"), [(2, 20, 3), (1, 64, 1)])
def test_a_step_writes_k_v_and_codes_in_one_launch(bits, dim, kv_heads, monkeypatch):
    """Of sequences with fewer tokens than a centre has, too; one of them has no new token."""
    pytest.importorskip("triton")
    from tidaldecode.ops import kernels
    from tidaldecode.ops.kernels import write as writing

    lengths = (1, 10, 16, 17, 40, 5)
    _, keys, kv, found = make(bits, dim, kv_heads, kv_heads, lengths=lengths)
    new = torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.int32, device=DEVICE)
    before = replace(kv, lengths=kv.lengths - new)
    rows = torch.zeros_like(keys)
    for b, length in enumerate(lengths):
        rows[b, 40 - length :] = keys[b, :length]
    reference.write_kv(rows[:, :-1], rows[:, :-1], before, before.lengths)
    caches = []
    monkeypatch.setattr(writing, "_write_kernel", None)  # there is no other launch
    for operations in (kernels, reference):
        copies = [part.clone() for part in (kv.k, kv.v, found.packed, found.factors)]
        there = replace(kv, k=copies[0], v=copies[1], codes=replace(found, packed=copies[2], factors=copies[3]))
        operations.write_kv(rows[:, -1:], 2 * rows[:, -1:], there, new)
        caches.append(copies)
    mine, wanted = caches
    assert torch.equal(mine[0], wanted[0]) and torch.equal(mine[1], wanted[1])
    assert (mine[2] ^ wanted[2]).float().count_nonzero() < 0.01 * mine[2].numel()
    torch.testing.assert_close(mine[3], wanted[3], rtol=1e-2, atol=1e-3)


def written_in_chunks(operations, keys, kv, chunk):
    """Codes of keys that are put into the cache and coded so many at a time."""
    lengths = torch.zeros_like(kv.lengths)
    while (lengths < kv.lengths).any():
        new = (kv.lengths - lengths).clamp(max=chunk)
        lengths = lengths + new
        for b, (end, count) in enumerate(zip(lengths.tolist(), new.tolist(), strict=True)):
            token = torch.arange(end - count, end, device=DEVICE)
            kv.k[kv.block_table[b, token // kv.k.shape[1]].long(), token % kv.k.shape[1]] = keys[b, token]
        operations.write_codes(replace(kv, lengths=lengths), new, int(new.sum()))
    return kv.codes.packed.clone(), kv.codes.factors.clone()


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_codes_go_by_the_keys_and_not_by_the_passes(chunk):
    """Of tokens that come some at a time, the first ones before there are as many as the centre is of."""
    at_once, some = (make(2, lengths=(45, 6, 0)) for _ in range(2))
    wanted = written_in_chunks(codes, at_once[1], at_once[2], 99)
    assert all(map(torch.equal, written_in_chunks(codes, some[1], some[2], chunk), wanted))


@pytest.mark.kernels
@pytest.mark.parametrize("chunk", [1, 30, 99])
def test_kernels_code_ragged_batches(chunk):
    pytest.importorskip("triton")
    from tidaldecode.ops import kernels

    by_reference, by_kernel = (make(2, lengths=(21, 6, 0, 17, 16)) for _ in range(2))
    wanted = written_in_chunks(codes, by_reference[1], by_reference[2], 99)
    packed, factors = written_in_chunks(kernels, by_kernel[1], by_kernel[2], chunk)
    assert (packed ^ wanted[0]).float().count_nonzero() < 0.01 * packed.numel()
    torch.testing.assert_close(factors, wanted[1], rtol=1e-2, atol=1e-3)


@pytest.mark.kernels
def test_kernels_write_the_references_importances():
    pytest.importorskip("triton")
    from tidaldecode.ops import kernels

    query, keys, kv, _ = make(2)
    write(keys, kv)
    rules = ["unified", "per_head"]
    wanted, found = (torch.zeros(len(LENGTHS), 7, 200, device=DEVICE) for _ in range(2))
    reference.importance_by_codes(query, kv, 0.2, rules, wanted)
    kernels.importance_by_codes(query, kv, 0.2, rules, found)
    for b, length in enumerate(LENGTHS):  # kept in steps of 1/1024 octave
        torch.testing.assert_close(found[b, :1, :length], wanted[b, :1, :length], rtol=2e-3, atol=1e-7)
        torch.testing.assert_close(found[b, 1:, :length], wanted[b, 1:, :length], rtol=0, atol=2e-3)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, *[torch.bfloat16, torch.float32] * torch.cuda.is_available()])
@pytest.mark.parametrize(
    ("bits", "dim", "heads", "kv_heads", "block_size", "rules"),
    [
        (1, 32, 6, 3, 16, ["unified"]),
        (2, 20, 5, 1, 256, ["per_group", "per_head"]),
        (1, 64, 7, 1, 16, ["per_group"]),
        (4, 16, 4, 2, 16, ["unified", "per_group"]),
        (2, 96, 3, 1, 256, ["per_group"]),
        (1, 16, 8, 1, 256, ["per_group"]),
        (2, 32, 16, 1, 16, ["unified"]),
        (4, 64, 2, 2, 256, ["per_head"]),
        *((*shape, ["per_group"]) for shape in LARGE),
    ],
)
def test_kernels_choose_the_references_tokens(dtype, bits, dim, heads, kv_heads, block_size, rules, monkeypatch):
    """But for ties: importances that agree in their exponent and first 8 bits."""
    pytest.importorskip("triton")
    from tidaldecode.ops import kernels

    monkeypatch.setattr("tidaldecode.ops.kernels.code_scores._LEAST_TILES", 1)  # several stretches of few tokens
    query, keys, kv, _ = make(bits, dim, heads, kv_heads, block_size, dtype)
    write(keys, kv)
    sets = sum({"unified": 1, "per_group": kv_heads, "per_head": heads}[rule] for rule in rules)
    choice = Choice.alike(kv.lengths, 24, recent=3, sinks=2)
    wanted, chosen = (torch.full((len(LENGTHS), sets, 24), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    select, seen = reference.select_tokens, []
    monkeypatch.setattr(reference, "select_tokens", lambda *given: seen.append(given[0]) or select(*given))
    probabilities = replace(RULES["per_head"], by_scores=False)
    monkeypatch.setitem(RULES, "per_head", probabilities)
    reference.choose_by_codes(query, kv, 0.2, rules, choice, 200, wanted)
    kernels.choose_by_codes(query, kv, 0.2, rules, choice, 200, chosen)
    for b, length in enumerate(LENGTHS):
        count = min(24, length)
        for s in range(sets):
            here, there = chosen[b, s, :count].long(), wanted[b, s, :count].long()
            assert len(set(here.tolist())) == count and set(here.tolist()) <= set(range(length))
            values = seen[0][b, s]
            torch.testing.assert_close(values[here].sort().values, values[there].sort().values, rtol=2**-6, atol=1e-9)


@pytest.mark.kernels
def test_sets_of_codes_depend_on_neither_rounds_nor_capacity_nor_what_lay_in_memory(monkeypatch):
    """The sequences in one round, in rounds of about one, and with room for many times their length."""
    pytest.importorskip("triton")
    from tidaldecode.ops import kernels

    monkeypatch.setattr("tidaldecode.ops.kernels.code_scores._PROGRAMS", 1)
    monkeypatch.setattr(f"{__name__}.LENGTHS", lengths := (530, 30, 520))
    query, keys, kv, _ = make(2, 16, 4, 2, 544, torch.float32, lengths)
    write(keys, kv)
    tables = []
    for room, capacity in ((1, 530), (2**29, 9000)):
        monkeypatch.setattr("tidaldecode.ops.rounds.ROOM", room)
        table = torch.full((3, 2, 60), -7, dtype=torch.int32, device=DEVICE)
        kernels.choose_by_codes(query, kv, 0.2, ["per_group"], Choice.alike(kv.lengths, 60, 5, 3), capacity, table)
        tables.append(table)
    assert torch.equal(*tables)


@pytest.mark.kernels
def test_more_ties_than_a_program_holds(monkeypatch):
    """The earliest of equal tokens are chosen."""
    pytest.importorskip("triton")
    from tidaldecode.ops import kernels

    monkeypatch.setattr("tidaldecode.ops.kernels.code_scores._PROGRAMS", 1)
    k = torch.ones(1, 1300, 1, 16, device=DEVICE)
    lengths = torch.tensor([1300], dtype=torch.int32, device=DEVICE)
    kv = KV(k, k, torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), lengths, room_for_codes(k, 2))
    indices = torch.full((1, 1, 700), -1, dtype=torch.int32, device=DEVICE)
    choice = Choice.alike(lengths, 700, recent=5, sinks=3)
    kernels.choose_by_codes(torch.randn(1, 4, 16, device=DEVICE), kv, 0.25, ["per_group"], choice, 1300, indices)
    assert indices[0, 0].tolist() == [*range(695), *range(1295, 1300)]


@pytest.mark.kernels
@pytest.mark.parametrize("dim", [20, 64])
def test_kernels_turn_queries_as_the_reference(dim):
    pytest.importorskip("triton")
    from tidaldecode.ops.codes import turned_query
    from tidaldecode.ops.kernels import code_scores

    query, _, _, codes = make(2, dim, 18, 1)
    query[0, 0] = 0
    (numbers, steps), (wanted, wanted_steps) = (turn(query, codes) for turn in (code_scores.turned_query, turned_query))
    torch.testing.assert_close(steps, wanted_steps, rtol=1e-5, atol=1e-20)
    assert (numbers.int() - wanted.int()).abs().max() <= 1 and (numbers != wanted).float().mean() < 0.01
    assert not numbers[0, 0].any()


class Grid:
    """In place of a kernel: keeps the grid of a launch."""

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *args, **kwargs: None


@pytest.mark.kernels
def test_grids_end_where_a_gpu_s_do(monkeypatch):
    """At 65,535 in all axes but the first: 32 prompts of 32,768 tokens, head dim 256."""
    pytest.importorskip("triton")
    writing = pytest.importorskip("tidaldecode.ops.kernels.write_codes")  # a function has the name, too

    k = torch.empty(1, 32_768, 2, 256, dtype=torch.float16, device=DEVICE)
    lengths = torch.full((32,), 32_768, dtype=torch.int32, device=DEVICE)
    kv = KV(k, k, torch.zeros(32, 1, dtype=torch.int32, device=DEVICE), lengths, room_for_codes(k, 1))
    monkeypatch.setattr(writing, "_write_kernel", launched := Grid())
    writing.write_codes(kv, lengths, 32 * 32_768)
    first, *others = launched.grid
    assert all(size <= 65_535 for size in others) and first >= 2 * 32 * 32_768 // 16


@pytest.mark.kernels
@pytest.mark.parametrize(("kv_heads", "tokens", "slots"), [(1, 32_000, 125), (2, 32_000, 125), (8, 102_400, 264)])
def test_few_heads_do_not_leave_a_program_for_each_tile(kv_heads, tokens, slots, monkeypatch):
    pytest.importorskip("triton")
    from tidaldecode.ops.kernels import code_scores, select

    monkeypatch.setattr("tidaldecode.ops.kernels.scratch.multiprocessors", lambda device: 132)
    k = torch.empty(1, tokens, kv_heads, 128, dtype=torch.float16, device=DEVICE)
    lengths = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
    kv = KV(k, k, torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), lengths, room_for_codes(k, 1))
    query, choice = torch.empty(1, kv_heads * 4, 128, dtype=torch.float16, device=DEVICE), Choice.alike(lengths, 24)
    indices = torch.empty(1, kv_heads, 24, dtype=torch.int32, device=DEVICE)
    pair = rounds.pair_of(kv.codes.packed.shape[3], 4)
    assert rounds.tile_of(pair) == 64
    scores = select.Choosing(query, kv, choice, tokens, 64, [indices], pair).scores
    monkeypatch.setattr(code_scores, "_score_kernel", launched := Grid())
    code_scores.score(query.char(), query[..., 0].float(), kv, kv.codes, 1.0, scores, 0)
    assert launched.grid == (kv_heads, slots)


def test_a_head_s_codes_lie_together():
    codes = room_for_codes(torch.zeros(2, 21, 3, 16), 2)
    assert codes.packed.shape == (2, 21, 3, 4) and codes.packed.stride() == (3 * 32 * 4, 4, 32 * 4, 1)
    assert codes.factors.shape == (2, 21, 3) and codes.factors.stride() == (3 * 32, 1, 32)


@pytest.mark.parametrize("chunk", [1024, 12])
def test_what_is_chosen_goes_neither_by_the_batch_nor_by_chunks(tiny, chunk, monkeypatch):
    """Each sequence decodes as it does alone; of chunks of 12 tokens the first ones hold padding alone."""
    model = apply(tiny("llama").double(), plan_of(tiny("llama").config, 1))
    given = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    mask = MASK.clone()
    mask[1, :30] = 0
    alone = [
        model.generate(PROMPTS[row : row + 1, start:], **given)[0, -12:].tolist() for row, start in ((0, 0), (1, 30))
    ]
    monkeypatch.setattr("tidaldecode.hf.forward.chunk_size", lambda tokens: min(tokens, chunk))
    assert model.generate(PROMPTS, attention_mask=mask, **given)[:, -12:].tolist() == alone


def test_codes_of_another_prompt_in_the_same_cache(tiny):
    """A cache that is reset is coded anew, about the new prompt's keys."""
    model = apply(tiny("llama"), "full")
    cache = filled(model, 2)
    model(PROMPTS[:, :1], past_key_values=cache)
    cache.reset()
    fresh = TidalCache(model.config, plan_of(model.config, 2), 64)
    for each in (cache, fresh):
        model(PROMPTS.flip(0), past_key_values=each)
        model(PROMPTS[:, :1], past_key_values=each)
    for old, new in zip(cache.layers[1:], fresh.layers[1:], strict=True):
        assert torch.equal(old.codes.packed[:, :61], new.codes.packed[:, :61])


def test_halves_do_not_overflow():
    """The sum of many keys is beyond float16, their mean is not."""
    layer = TidalLayer(Sequences(100), 1, True)
    layer.use_codes(1, None)
    rows = torch.full((1, 2, 90, 16), 30000.0, dtype=torch.float16)
    layer.sequences.begin(1, 90, torch.device("cpu"), None)
    layer.update(rows, rows)
    assert not layer.codes.factors[:, :90].any()


def test_sparse_layers_read_what_codes_chose_and_one_pass_is_as_many_steps(tiny):
    model = apply(tiny("llama"), "full")
    roles = ("full", "quantized_select", "sparse", "select", "sparse", "quantized_select", "sparse")
    assert model.config.num_hidden_layers == len(roles)
    own = [Source(layer=5, selection="unified", head=0)] * 3 + [Source(layer=3, selection="per_group", head=1)] * 3
    plan = TidalPlan(roles=roles, selection="per_group", token_budget=16, key_bits=2, sources={5: own})
    cache = TidalCache(model.config, plan, 100)
    model(PROMPTS[:1, :50], past_key_values=cache)
    mark, ids = cache.mark(), PROMPTS[:1, 40:52]
    steps = torch.cat([model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(11)], 1)
    assert cache.attention.writes[5] == ["unified", "per_group"] and cache.attention.tokens_read(60)[3] == 60
    assert cache.attention.tokens_read(60)[2] == 16 < cache.attention.tokens_read(60)[1]
    cache.go_back(mark)
    scored = torch.cat(list(step_logits(model, cache, ids[:, :11])), 1)
    torch.testing.assert_close(scored, steps, rtol=0, atol=1e-4)


def test_lossless_decoding_drafts_by_codes(tiny):
    """Passes over drafted tokens write codes too, and what was rejected is coded anew."""
    model = apply(tiny("llama"), plan_of(tiny("llama").config, 2))
    given = {"attention_mask": MASK, "max_new_tokens": 24, "do_sample": False}
    drafted = model.generate(PROMPTS, lossless=3, **given)
    apply(remove(model), "full")
    assert torch.equal(drafted, model.generate(PROMPTS, **given))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"roles": ("full", "quantized_select")}, "key_bits: give 1, 2 or 4 if, and only if, a layer is quantized"),
        ({"roles": ("full", "select"), "key_bits": 1}, "key_bits: give 1, 2 or 4 if, and only if"),
        ({"roles": ("full", "quantized_select"), "key_bits": 3}, "key_bits: Input should be 1, 2 or 4"),
        (
            {"roles": ("quantized_select",), "key_bits": 1, "model": {**SHAPE, "num_layers": 1, "head_dim": 20}},
            "1 bits of 20 channels fill no whole bytes",
        ),
        (
            {"roles": ("sparse", "quantized_select"), "key_bits": 1},
            "layer 0 is sparse but no layer below it is select",
        ),
    ],
)
def test_plans_that_can_not_be(fields, line):
    with pytest.raises(InputError, match=line):
        TidalPlan.validated(selection="unified", token_budget=16, **fields)


def test_a_plan_file_keeps_its_bits_and_older_plans_their_digests(tmp_path):
    plan = TidalPlan(roles=("full", "quantized_select"), selection="unified", token_budget=16, key_bits=2)
    plan.save(tmp_path / "plan.json")
    assert TidalPlan.load(tmp_path / "plan.json") == plan
    assert "key_bits" not in TidalPlan.paper(6).to_json()
    plans = plan, plan.model_copy(update={"key_bits": 1})
    assert len({Method.named("tidal", plan=each).key()["plan_digest"] for each in plans}) == 2


def test_generate_by_a_plan_without_sparse_layers(run, tiny, byte_tokenizer, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    plan_of(model.config, 2).save(tmp_path / "plan.json")
    given = "--model", str(tmp_path / "model"), "--plan", str(tmp_path / "plan.json"), "--max-new-tokens", "4", "--json"
    status, out, err = run("generate", "Call me Ishmael. " * 4, *given)
    assert status == 0 and "quantized select layers" in err
    codes = json.loads(out)["context_tokens"] * 6 / 64  # 4 bytes of codes and 2 of a factor, of 64 of K and V
    assert json.loads(out)["tokens_read_per_kv_head"] == pytest.approx(16 + codes, abs=0.5)


def test_steps_without_a_prompt_before_them(tiny):
    """A prompt of one token is not read: the pass over steps is the first."""
    model = apply(tiny("llama"), "full")
    cache = TidalCache(model.config, plan_of(model.config, 2), 64)
    assert torch.cat(list(step_logits(model, cache, PROMPTS[:1, :5])), 1).isfinite().all()


def test_memory_is_asked_for_the_codes_of_all_layers(tiny):
    cache = TidalCache(tiny("llama").config, plan_of(tiny("llama").config, 2), 64)
    assert cache.layers[0].code_bits == 0 and cache.layers[0].bits_of_all == [0, *[2] * 6]


def test_codes_that_do_not_fit_are_refused_before_any_is_made(monkeypatch):
    """1 sequence, 4 heads, head dim 64: codes of 2 bits and a factor are 18 bytes, in each of 3 layers."""
    free = 2**20
    monkeypatch.setattr("tidaldecode.hf.layers._free_bytes", lambda device: free)

    class Keys:
        """The little that is asked of keys on a GPU."""

        device, shape = torch.device("cuda", 0), torch.Size((1, 4, 100_000, 64))

    layers = [TidalLayer(Sequences(100_000), 4, n == 0) for n in range(4)]
    for layer in layers:
        layer.is_initialized, layer.keys = True, Keys
    wanted = list(zip(layers, (0, 2, 2, 2), strict=True))
    line = r"the codes of 1 x 100,000 keys need 0\.020 GiB, and 0\.001 GiB .*: 0\.019 GiB are missing; take a plan"
    with pytest.raises(MemoryShortError, match=line) as caught:
        check_codes(wanted)
    assert "\n" not in str(caught.value)
    free = 3 * 4 * 100_000 * 18
    check_codes(wanted)
    free -= 1
    with pytest.raises(MemoryShortError):
        check_codes(wanted)


@pytest.mark.parametrize("bits", [None, 1])
def test_a_cache_whose_codes_find_no_memory_goes_on_as_before(tiny, bits, monkeypatch):
    """From full attention, or from codes of other bits, whose third layer finds none."""
    model = apply(tiny("llama"), "full")
    before = "full" if bits is None else plan_of(model.config, bits)
    cache, other = (TidalCache(model.config, before, 64) for _ in range(2))
    for each in (cache, other):
        model(PROMPTS, attention_mask=MASK, past_key_values=each)
    made = []

    def short(*given):
        made.append(given)
        if len(made) == 3:
            raise torch.OutOfMemoryError
        return room_for_codes(*given)

    attention, moves = cache.attention, cache.sequences.moves
    with monkeypatch.context() as patch:
        patch.setattr("tidaldecode.hf.layers.room_for_codes", short)
        with pytest.raises(torch.OutOfMemoryError):
            cache.use_plan(plan_of(model.config, 2))
    assert cache.attention is attention and cache.sequences.moves == moves
    assert [layer.code_bits for layer in cache.layers] == [0, *[bits or 0] * 6] == cache.layers[0].bits_of_all
    logits = [model(PROMPTS[:, :1], past_key_values=each).logits for each in (cache, other)]
    assert torch.equal(*logits)
    for each in (cache, other):  # again, now that there is some
        each.use_plan(plan_of(model.config, 2))
    logits = [model(PROMPTS[:, :1], past_key_values=each).logits for each in (cache, other)]
    assert torch.equal(*logits) and all(layer.codes.bits == 2 for layer in cache.layers[1:])
