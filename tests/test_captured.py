"""The decode step that is compiled and captured, against the model's own steps through the same kind of cache."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch

from families import FAMILIES
from tidaldecode import TidalCache, TidalPlan, apply, ops
from tidaldecode.errors import InputError
from tidaldecode.hf import captured
from tidaldecode.hf.applied import plain_forward
from tidaldecode.hf.layers import TidalLayer
from tidaldecode.hf.merged import merged_products
from tidaldecode.hf.second_pass import Correction, full_pass
from tidaldecode.hf.sequences import Sequences
from tidaldecode.hf.session import STEP, Session
from tidaldecode.methods.quest import QuestAttention
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models import model_shape
from tidaldecode.ops import KV
from tidaldecode.plan import ModelShape
from tidaldecode.plans.find import find_plan

GLOBAL_FAMILIES = [family for family in FAMILIES if family != "gemma3_text"]

PROMPT = torch.randint(0, 200, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(PROMPT)
MASK[1, :6] = 0
POSITIONS = torch.tensor([[20], [14]])
TOKEN = PROMPT[:, :1], POSITIONS
ROLES = ("full", "select", "sparse", "select", "sparse")  # what is traced takes its time by the layer


def read_prompt(model, plan, capacity, cache=None):
    """A cache that holds the prompt, its second sequence 6 tokens shorter."""
    cache = cache or TidalCache(model.config, plan, capacity)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    arguments = {"attention_mask": MASK, "position_ids": positions, "logits_to_keep": 1}
    with torch.no_grad():
        model(
            PROMPT.to(model.device),
            past_key_values=cache,
            **{
                name: value.to(model.device) if name != "logits_to_keep" else value for name, value in arguments.items()
            },
        )
    return cache


def next_tokens(steps, device):
    return torch.randint(0, 200, (steps, 2, 1), generator=torch.Generator().manual_seed(1)).to(device)


@contextmanager
def uncaptured(cache):
    """The model's own steps on a GPU too."""
    before = cache.session.graphs.pop(STEP, None)
    cache.session.refused.add(STEP)
    yield
    cache.session.refused.discard(STEP)
    if before is not None:
        cache.session.graphs[STEP] = before


def chunks(cache):
    """The captured passes over chunks, by their tokens."""
    return {tokens: graph for tokens, graph in cache.session.graphs.items() if tokens != STEP}


def begin(cache, tokens, kind):
    """Starts a pass on the device alone, as a captured one does."""
    cache.sequences.advance(tokens)
    cache.session.begin(kind, tokens)


@pytest.mark.parametrize("family", GLOBAL_FAMILIES)
def test_the_traced_step_is_the_models_own(tiny, family):
    torch._dynamo.reset()
    model = tiny(family, num_hidden_layers=len(ROLES))
    plan = TidalPlan(roles=ROLES, selection="per_head", token_budget=8)
    apply(model, plan)
    own, traced = read_prompt(model, plan, 40), read_prompt(model, plan, 40)
    step = torch.compile(captured.decode_step, fullgraph=True, dynamic=False, backend="eager")
    for token in next_tokens(3, "cpu"):
        positions = own.sequences.lengths[:, None].long()
        expected = model(token, position_ids=positions, past_key_values=own).logits
        begin(traced, 1, "step")
        with torch.no_grad(), captured.running(traced.session.write_and_attend), merged_products(model):
            logits = step(plain_forward(model), token, positions)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(own.sequences.lengths, traced.sequences.lengths)


@pytest.mark.parametrize("family", GLOBAL_FAMILIES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_traced_pass_over_a_chunk_is_the_models_own(tiny, family, tokens):
    torch._dynamo.reset()
    model = tiny(family, num_hidden_layers=len(ROLES))
    plan = TidalPlan(roles=ROLES, selection="per_head", token_budget=8)
    apply(model, plan)
    own, traced = read_prompt(model, plan, 40), read_prompt(model, plan, 40)
    step = torch.compile(captured.decode_step, fullgraph=True, dynamic=False, backend="eager")
    ids = PROMPT[:, :tokens].contiguous()
    for _ in range(2):
        positions = own.sequences.lengths[:, None].long() + torch.arange(tokens)
        expected = full_pass(model, own, ids, positions)
        begin(traced, tokens, "full")
        with torch.no_grad(), captured.running(traced.session.write_and_attend), merged_products(model):
            logits = step(plain_forward(model), ids, positions)
        traced.count(tokens)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(own.sequences.lengths, traced.sequences.lengths)
    assert own.get_seq_length() == traced.get_seq_length() == 20 + 2 * tokens


def test_traced_rounds_out_of_verification_are_the_models_own(tiny):
    """A pass that chooses and the drafts behind it, twice; some of the tokens are taken back in between."""
    torch._dynamo.reset()
    model = tiny("llama")
    plan = find_plan("paper", model.config).with_budget(8).with_drafting("verification")
    apply(model, plan)
    own, traced = (read_prompt(model, plan, 60).for_drafts(3) for _ in range(2))
    step = torch.compile(captured.decode_step, fullgraph=True, dynamic=False, backend="eager")
    for start in (20, 22):
        for cache in (own, traced):
            cache.rewind(start, torch.tensor([start, start - 6]))
        positions = own.sequences.lengths[:, None].long() + torch.arange(4)
        expected = full_pass(model, own, PROMPT[:, :4], positions)
        begin(traced, 4, "full")
        with torch.no_grad(), captured.running(traced.session.write_and_attend), merged_products(model):
            logits = step(plain_forward(model), PROMPT[:, :4].contiguous(), positions)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        traced.count(4)
        assert torch.equal(own.attention.indices.sort(-1).values, traced.attention.indices.sort(-1).values)
        for cache in (own, traced):
            cache.rewind(start + 2, cache.sequences.lengths - 2)
        for token in next_tokens(3, "cpu"):
            positions = own.sequences.lengths[:, None].long()
            expected = model(token, position_ids=positions, past_key_values=own).logits
            begin(traced, 1, "step")
            with torch.no_grad(), captured.running(traced.session.write_and_attend), merged_products(model):
                logits = step(plain_forward(model), token, positions)
            traced.count(1)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(own.attention.counts, traced.attention.counts)


class Replayed:
    """Stands for a CUDA graph and its stream where there is no GPU: a replay runs the pass again."""

    def __init__(self, *_):
        pass

    def replay(self):
        self.logits.copy_(self.run())

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def without_gpu(monkeypatch):
    """Lets passes be captured and replayed on the CPU, uncompiled."""
    capture = captured.CapturedPass._capture

    def captures(step, sequences, run):
        capture(step, sequences, run)
        attend = captured._running.attend

        def again():
            session = attend.__self__
            prepared = session.prepared  # what the host did at the capture, it does not do in a replay
            with torch.no_grad(), captured.running(attend):
                logits = run()
            session.prepared = prepared
            return logits

        step._graph.run, step._graph.logits = again, step._logits

    @contextmanager
    def graph(graph, stream, capture_error_mode):
        """A graph that is captured runs nothing: what it would have counted is taken back."""
        yield
        sequences.lengths.sub_(sequences.new_lengths)

    sequences = None

    def with_sequences(of):
        nonlocal sequences
        sequences = of

    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Replayed)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(captured.CapturedPass, "_capture", captures)
    monkeypatch.setattr(captured, "_compiled_step", captured.decode_step)
    monkeypatch.setattr(Session, "_obstacle", lambda *_: None)
    return with_sequences


@pytest.mark.parametrize("method", ["plan", "verification", "quest"])
def test_replayed_passes_are_the_models_own(tiny, without_gpu, method):
    """Steps, chunks and drafts one after another: each finds the cache as the one before left it."""
    model = tiny("llama").double()
    plan = find_plan("paper", model.config).with_budget(8)
    plan = plan.with_drafting("verification") if method == "verification" else plan
    apply(model, plan)
    own, replayed = caches = [read_prompt(model, plan, 80) for _ in range(2)]
    without_gpu(replayed.sequences)
    if method == "quest":
        for cache in caches:
            cache.attention = QuestAttention(model_shape(model.config), 8, page_size=2)

    def check(one, other, ids, kind):
        positions = one.sequences.lengths[:, None].long() + torch.arange(ids.shape[1])
        other.ready(*ids.shape)
        logits = other.replay(model, ids, positions, kind)
        if kind == "full":
            expected = full_pass(model, one, ids, positions)
        else:
            expected = model(ids, position_ids=positions, past_key_values=one).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        assert one.get_seq_length() == other.get_seq_length()
        assert torch.equal(one.sequences.lengths, other.sequences.lengths)

    for token in next_tokens(3, "cpu"):
        check(own, replayed, token, "step")
    drafts = own.for_drafts(8), replayed.for_drafts(8)
    for _ in range(2):
        check(*drafts, PROMPT[:, :9], "full")
        for cache in drafts if method != "quest" else ():  # which has to look at the chunk itself
            cache.rewind(cache.get_seq_length() - 2, cache.sequences.lengths - 2)
        for token in next_tokens(2, "cpu"):
            check(*drafts, token, "step")
    assert drafts[1].session.graphs.keys() == {STEP, 9} and not drafts[0].session.graphs


@pytest.mark.parametrize("recent", [1, 7, 0.0, 0.25, 0.9])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 1 / 3, 0.5, 1.0])
def test_budgets_on_the_device_are_the_plans(fraction, recent):
    roles = ("full", "select", "sparse")
    plan = TidalPlan(roles=roles, selection="unified", token_budget=fraction, sink_tokens=4, recent_tokens=recent)
    shape = ModelShape(num_layers=3, num_query_heads=2, num_kv_heads=1, head_dim=8)
    lengths = torch.cat([torch.arange(1, 400), torch.tensor([10**5, 10**6 - 1])]).int()
    attention = DecodeAttention(plan, shape)
    attention.begin(lengths, 10**6)
    budgets = [plan.budget_for(length) for length in lengths.tolist()]
    assert attention._choices[0].budgets.tolist() == budgets
    assert attention._choices[0].recents.tolist() == [plan.recent_for(budget) for budget in budgets]


def test_a_model_that_cannot_be_captured_says_so_once(tiny, caplog):
    model = apply(tiny("gemma3_text"), "paper")
    with caplog.at_level(logging.WARNING, "tidaldecode"):
        for _ in range(2):
            cache = read_prompt(model, model._tidaldecode.plan, 40)
            assert cache.session.captured(model, *TOKEN, "step") is None
            assert cache.session.captured(model, *TOKEN, "step") is None
    (message,) = (record.getMessage() for record in caplog.records if record.name == "tidaldecode")
    assert message.startswith(
        "the decode step runs without a CUDA graph, and slower: some layers keep a sliding window"
    )


def test_a_failed_capture_leaves_the_cache_as_it_was(tiny, monkeypatch, caplog):
    model = apply(tiny("llama"), "paper")
    cache = read_prompt(model, model._tidaldecode.plan, 40)
    before = cache.sequences.lengths.clone()

    class Fails:
        def __init__(self, model, sequences, begin, *inputs):
            begin()
            raise RuntimeError("no graph today\nand more lines")

    monkeypatch.setattr(captured, "CapturedPass", Fails)
    monkeypatch.setattr(Session, "_obstacle", lambda *_: None)
    with caplog.at_level(logging.WARNING, "tidaldecode"):
        assert cache.session.captured(model, *TOKEN, "step") is None
    assert "RuntimeError: no graph today" in caplog.text and "more lines" not in caplog.text
    assert torch.equal(cache.sequences.lengths, before)
    assert cache.session.refused == {STEP}


def test_a_chunk_that_can_not_be_captured_runs_all_the_same(tiny, monkeypatch, caplog):
    model = apply(tiny("llama"), "paper")
    cache = read_prompt(model, model._tidaldecode.plan, 100)
    before, made = cache.sequences.lengths.clone(), []

    def fails(model, sequences, begin, attend, ids, positions):
        assert positions is POSITIONS
        made.append(ids.shape[1])
        begin()
        raise RuntimeError("no graph today")

    monkeypatch.setattr(captured, "CapturedPass", fails)
    monkeypatch.setattr(ops, "has_kernel", lambda rows: True)
    with caplog.at_level(logging.WARNING, "tidaldecode"):
        for tokens in (4, 4, 70, 7):
            assert cache.session.captured(model, torch.zeros(2, tokens).long(), POSITIONS, "full") is None
    assert made == [4, 7]  # each once, and no try where there is no kernel
    assert "the pass over 4 tokens with full attention runs without a CUDA graph" in caplog.text
    assert "no kernel for chunks of more than 65 tokens" in caplog.text
    assert torch.equal(cache.sequences.lengths, before)


def test_a_compilation_that_the_user_stops_leaves_the_cache_as_it_was(tiny, monkeypatch):
    model = apply(tiny("llama"), "paper")
    cache = read_prompt(model, model._tidaldecode.plan, 40)
    before = cache.sequences.lengths.clone()

    def stopped(model, sequences, begin, *inputs):
        begin()
        raise KeyboardInterrupt

    monkeypatch.setattr(captured, "CapturedPass", stopped)
    monkeypatch.setattr(Session, "_obstacle", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        cache.session.captured(model, *TOKEN, "step")
    assert torch.equal(cache.sequences.lengths, before)
    assert not cache.session.refused


def test_a_capture_warms_up_with_the_tokens_that_it_is_for(tiny, monkeypatch):
    """What a stopped warm-up leaves behind must be their K and V; and the buffers are its own, not the caller's."""
    model = apply(tiny("llama"), "paper")
    cache, runs = read_prompt(model, model._tidaldecode.plan, 40), []
    ids, positions = PROMPT[:, :3].clone(), torch.arange(20, 23)[None]

    def runs_once(step, sequences, run):
        runs.append((step._input_ids, step._position_ids))
        raise KeyboardInterrupt

    monkeypatch.setattr(captured.CapturedPass, "_capture", runs_once)
    monkeypatch.setattr(Session, "_obstacle", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(KeyboardInterrupt):
        cache.session.captured(model, ids, positions, "full")
    ((input_ids, position_ids),) = runs
    assert torch.equal(input_ids, ids) and input_ids is not ids
    assert torch.equal(position_ids, positions.expand(2, 3))


def test_another_models_step_is_not_used(tiny, monkeypatch):
    """Nor that of a model whose weights were converted since, nor that of a cache that lies elsewhere."""
    made = []

    class Pass(captured.CapturedPass):
        def __init__(self, model, sequences, *inputs):
            self._model, self._weights = weakref.ref(model), captured.weights_now(model)
            self._moves = sequences.moves
            made.append(model)

    monkeypatch.setattr(captured, "CapturedPass", Pass)
    monkeypatch.setattr(Session, "_obstacle", lambda *_: None)
    models = [apply(tiny("llama"), "paper") for _ in range(2)]
    cache = read_prompt(models[0], models[0]._tidaldecode.plan, 40)
    for model in (models[0], models[0], models[1]):
        assert cache.session.captured(model, *TOKEN, "step") is cache.session.step
    assert cache.session.captured(models[1].half(), *TOKEN, "step") is cache.session.step
    assert made == [models[0], models[1], models[1]]
    step = cache.session.step
    cache.make_room(100)
    assert cache.session.captured(models[1], *TOKEN, "step") is cache.session.step is not step
    assert copy.deepcopy(cache.session.step) is pickle.loads(pickle.dumps(cache.session.step)) is None


def test_a_cache_left_in_the_middle_is_refused(tiny):
    model = apply(tiny("llama"), "paper")
    cache = TidalCache(model.config, model._tidaldecode.plan, 40)
    cache.begin(2, 10, torch.device("cpu"))  # a forward pass that did not come to any layer
    with pytest.raises(InputError, match="left in the middle of a forward pass"):
        model(PROMPT[:, :1], past_key_values=cache)
    with pytest.raises(InputError, match="left in the middle of a forward pass"):
        cache.ready(2, 1)


def test_a_step_beside_sliding_windows_is_not_refused(tiny):
    model = apply(tiny("gemma3_text"), "paper")
    read_prompt(model, model._tidaldecode.plan, 40).ready(2, 1)


def test_a_budget_beyond_any_context(tiny):
    model = apply(tiny("llama"), find_plan("paper", tiny("llama").config).with_budget(5 * 10**9))
    cache = read_prompt(model, model._tidaldecode.plan, 40)
    model(PROMPT[:, :1], past_key_values=cache)
    assert cache.attention.counts.tolist() == cache.sequences.lengths.tolist()


def test_quest_keeps_its_bounds_where_they_are():
    """A captured step reads them there."""
    quest = QuestAttention(ModelShape(num_layers=3, num_query_heads=2, num_kv_heads=1, head_dim=8), 32)
    block_table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([64], dtype=torch.int32)
    keys = torch.randn(2, 1, 64, 1, 8)
    quest.prepare(2, KV(keys[0], keys[0], block_table, lengths))
    kept = quest._bounds[2]
    before = kept.clone()
    quest.prepare(2, KV(keys[1], keys[1], block_table, lengths))
    assert quest._bounds[2] is kept and not torch.equal(kept, before)


@pytest.fixture
def gpu_model(tiny):
    def make(plan, family="llama", **overrides):
        return apply(tiny(family, **overrides).cuda(), plan)

    return make


PLANS = {
    "full": lambda config: find_plan("full", config),
    "paper": lambda config: find_plan("paper", config).with_budget(8),
    "unified": lambda config: find_plan("paper", config).model_copy(
        update={"selection": "unified", "token_budget": 8, "recent_tokens": 0.25, "sink_tokens": 2}
    ),
    "fraction": lambda config: find_plan("paper", config).with_budget(0.3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_captured_steps_equal_uncaptured_ones(gpu_model, tiny, family, plan):
    plan = PLANS[plan](tiny(family).config)
    model = gpu_model(plan, family)
    one, other = read_prompt(model, plan, 80), read_prompt(model, plan, 80)
    for token in next_tokens(40, "cuda"):
        positions = one.sequences.lengths[:, None].long()
        logits = model(token, position_ids=positions, past_key_values=one).logits
        with uncaptured(other):
            expected = model(token, position_ids=positions, past_key_values=other).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert one.session.step is not None and other.session.step is None
    assert one.get_seq_length() == other.get_seq_length() == 60
    assert torch.equal(one.sequences.lengths, other.sequences.lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 33, 65])
def test_captured_chunks_equal_uncaptured_ones(gpu_model, tiny, tokens):
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    one, other = read_prompt(model, plan, 300), read_prompt(model, plan, 300)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        ids = torch.randint(0, 200, (2, tokens), generator=generator).cuda()
        positions = one.sequences.lengths[:, None].long() + torch.arange(tokens, device="cuda")
        logits = full_pass(model, one, ids, positions)
        expected = full_pass(model, other, ids, positions, capture=False)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)  # float32 sums in another order
    assert chunks(one).keys() == {tokens} and not chunks(other)
    assert torch.equal(one.sequences.lengths, other.sequences.lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("drafting", ["plan", "verification"])
def test_lossless_rounds_replay_graphs(gpu_model, tiny, drafting):
    """In float32 the tokens are full attention's, and the cache's rows are corrected by captured passes too."""
    plan = PLANS["paper"](tiny().config).with_drafting(drafting)
    model = gpu_model(plan)
    arguments = {"attention_mask": MASK.cuda(), "max_new_tokens": 40, "pad_token_id": 0, "do_sample": False}
    cache = TidalCache(model.config, PLANS["full"](model.config), 80)
    expected = model.generate(PROMPT.cuda(), past_key_values=cache, **arguments)
    cache = TidalCache(model.config, plan, 80)
    assert torch.equal(model.generate(PROMPT.cuda(), past_key_values=cache, lossless=4, **arguments), expected)
    drafts = cache.for_drafts(4)
    assert drafts.session.step is not None and chunks(drafts).keys() == {5}
    assert (drafts is cache) == (drafting == "plan")
    with uncaptured(drafts):  # the same rounds by the model's own steps
        del drafts.session.graphs[5]
        drafts.session.refused.add(5)
        rounds = cache.rounds
        cache.reset()
        assert torch.equal(model.generate(PROMPT.cuda(), past_key_values=cache, lossless=4, **arguments), expected)
        assert cache.rounds == rounds
    cache = TidalCache(model.config, plan, 80)
    output = model.generate(PROMPT.cuda(), past_key_values=cache, correction_interval=6, **arguments)
    assert cache.session.step is not None and chunks(cache).keys() == {6}
    cache.crop(-3)  # 36 of 39 decoded tokens are corrected
    assert_prefilled(model, cache, output)


@pytest.mark.gpu
@pytest.mark.parametrize("drafting", ["plan", "verification"])
def test_lossless_auto_replays_graphs_of_full_steps_too(gpu_model, tiny, drafting):
    plan = PLANS["paper"](tiny().config).with_drafting(drafting)
    model = gpu_model(plan)
    arguments = {"attention_mask": MASK.cuda(), "max_new_tokens": 80, "pad_token_id": 0, "do_sample": False}
    cache = TidalCache(model.config, PLANS["full"](model.config), 120)
    expected = model.generate(PROMPT.cuda(), past_key_values=cache, **arguments)
    cache = TidalCache(model.config, plan, 120)
    assert torch.equal(model.generate(PROMPT.cuda(), past_key_values=cache, lossless="auto", **arguments), expected)
    steps, drafts = cache.for_full_steps().session, cache.for_drafts(16).session
    assert steps.step is not None and drafts.step is not None and steps.step is not drafts.step
    pace = cache.rounds.pace
    assert cache.rounds.drafted[:3] == [0, 0, 0] and min(pace.draft_ms, pace.pass_ms, pace.full_step_ms) > 0
    assert pace.draft_ms < 1000 and pace.full_step_ms < 1000  # without what compiles


def assert_prefilled(model, cache, output):
    """Every row of the cache is as after reading the tokens at once."""
    tokens = cache.get_seq_length()
    exact = TidalCache(model.config, PLANS["full"](model.config), tokens)
    mask = torch.nn.functional.pad(MASK, (0, tokens - 20), value=1).cuda()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(output[:, :tokens], attention_mask=mask, position_ids=positions, past_key_values=exact)
    for mine, theirs in zip(cache.layers, exact.layers, strict=True):
        for b, length in enumerate(cache.sequences.lengths.tolist()):
            for rows, wanted in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                torch.testing.assert_close(rows[b, :, :length], wanted[b, :, :length], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_capture_that_the_user_stops_leaves_the_tokens_own_rows(gpu_model, tiny, monkeypatch):
    """Of a correction: the cache keeps the tokens, and their rows must not be another token's."""
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    cache, ids = read_prompt(model, plan, 80), next_tokens(4, "cuda")
    cache.correction = Correction(4)

    def decode(token):
        model(token, position_ids=cache.sequences.lengths[:, None].long(), past_key_values=cache)

    for token in ids[:3]:
        decode(token)

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "graph", stopped)
    with pytest.raises(KeyboardInterrupt):
        decode(ids[3])
    assert cache.get_seq_length() == 24 and not chunks(cache)
    assert_prefilled(model, cache, torch.cat([PROMPT.cuda(), ids[:, :, 0].T], 1))


@pytest.mark.gpu
def test_one_chunk_graph_serves_a_cache_for_good(gpu_model, tiny):
    """After crop and reset, and beside another plan; for another batch there is a new one."""
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    cache = read_prompt(model, plan, 80)

    def run(**options):
        lengths = cache.sequences.lengths[:, None].long()
        ids = PROMPT[: len(lengths), :9].cuda()
        return full_pass(model, cache, ids, lengths + torch.arange(9, device="cuda"), **options).clone()

    first = run()
    graph = chunks(cache)[9]
    cache.crop(-9)
    torch.testing.assert_close(run(), first, rtol=0, atol=0)
    cache.crop(-9)
    cache.use_plan(PLANS["full"](model.config))
    model(PROMPT[:, :1].cuda(), past_key_values=cache)
    cache.crop(-1)
    torch.testing.assert_close(run(), first, rtol=0, atol=0)
    cache.reset()
    read_prompt(model, plan, 80, cache)
    torch.testing.assert_close(run(), first, rtol=0, atol=0)
    assert chunks(cache) == {9: graph}
    cache.reset()
    with torch.no_grad():
        model(PROMPT[:1].cuda(), past_key_values=cache, logits_to_keep=1)
    assert chunks(cache) == {}
    alone = run()
    cache.crop(-9)
    torch.testing.assert_close(run(capture=False), alone, rtol=1e-3, atol=1e-3)
    assert chunks(cache).keys() == {9} and chunks(cache)[9] is not graph


@pytest.mark.gpu
def test_a_captured_chunk_keeps_no_more_than_its_activations(gpu_model, tiny):
    """No workspace of its own for products beside the decode step's, 32 MiB on a Hopper GPU."""
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    cache = read_prompt(model, plan, 80)
    model(PROMPT[:, :1].cuda(), past_key_values=cache)
    allocated = torch.cuda.memory_allocated()
    ids = PROMPT[:, :9].cuda()
    full_pass(model, cache, ids, cache.sequences.lengths[:, None].long() + torch.arange(9, device="cuda"))
    assert chunks(cache).keys() == {9}
    assert torch.cuda.memory_allocated() - allocated < 4 * 2**20


@pytest.mark.gpu
def test_one_graph_serves_a_cache_for_good(gpu_model, tiny):
    """After crop and reset the same graph runs on; with another plan or batch a new one."""
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    cache = read_prompt(model, plan, 80)
    tokens = next_tokens(10, "cuda")

    def decode(how_many):
        return torch.cat([model(token, past_key_values=cache).logits for token in tokens[:how_many]])

    first = decode(5)
    step = cache.session.step
    assert step is not None
    cache.crop(-5)
    torch.testing.assert_close(decode(5), first, rtol=1e-5, atol=1e-5)
    assert cache.session.step is step
    cache.use_plan(PLANS["full"](model.config))
    assert cache.session.step is None
    cache.crop(-5)
    with uncaptured(cache):
        expected = decode(5)
    cache.crop(-5)
    torch.testing.assert_close(decode(5), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 20}])
def test_generate_replays_a_graph(gpu_model, tiny, sampling):
    plan = PLANS["paper"](tiny().config).with_budget(64)  # the whole context
    model = gpu_model(plan)
    arguments = {"attention_mask": MASK.cuda(), "max_new_tokens": 30, "pad_token_id": 0, **sampling}
    outputs = []
    for used in (plan, PLANS["full"](model.config)):
        cache = TidalCache(model.config, used, 60)
        torch.manual_seed(0)
        outputs.append(model.generate(PROMPT.cuda(), past_key_values=cache, **arguments))
        assert cache.session.step is not None
    assert torch.equal(*outputs)


@pytest.mark.gpu
def test_what_a_graph_does_not_give_runs_without(gpu_model, tiny):
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    cache = read_prompt(model, plan, 80)
    token = next_tokens(1, "cuda")[0]
    output = model(token, past_key_values=cache, output_hidden_states=True)
    assert output.hidden_states is not None and cache.session.step is None
    assert model(token, past_key_values=cache).logits.shape[1] == 1 and cache.session.step is not None


@pytest.mark.gpu
def test_ten_thousand_steps_in_one_graph(gpu_model, tiny):
    """No memory grows, and nothing drifts from the steps that are not captured."""
    config = tiny(max_position_embeddings=20_000).config
    plan = PLANS["unified"](config).model_copy(update={"token_budget": 64})
    model = gpu_model(plan, max_position_embeddings=20_000)
    one, other = read_prompt(model, plan, 10_100), read_prompt(model, plan, 10_100)
    tokens = next_tokens(10_000, "cuda")
    model(tokens[0], past_key_values=one)
    step = one.session.step
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    for token in tokens[1:]:
        logits = model(token, past_key_values=one).logits
    torch.cuda.synchronize()
    assert one.session.step is step
    assert torch.cuda.memory_allocated() <= allocated + 2**20
    with uncaptured(other):
        for token in tokens:
            expected = model(token, past_key_values=other).logits
    assert torch.equal(one.sequences.lengths, other.sequences.lengths)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(one.attention.indices.sort(-1).values, other.attention.indices.sort(-1).values)


def test_a_step_that_does_not_fit_is_refused_before_it_is_warmed_up(tiny, monkeypatch):
    model = apply(tiny("llama"), "paper")
    cache = read_prompt(model, model._tidaldecode.plan, PROMPT.shape[1])
    places = [layer.keys.data_ptr() for layer in cache.layers]

    def short(layer, keys, values, capacity):
        raise InputError(f"no room for {capacity}")

    monkeypatch.setattr(TidalLayer, "check_memory", short)
    with pytest.raises(InputError, match="no room for 21"):
        cache.ready(2, 1)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    assert cache.capacity == cache.get_seq_length() == 20
    with pytest.raises(InputError, match="the cache holds 2 sequences, the input has 3"):
        cache.ready(3, 1)


@pytest.mark.gpu
def test_a_full_cache_grows_and_is_captured_anew(gpu_model, tiny):
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    small, large = (read_prompt(model, plan, capacity) for capacity in (PROMPT.shape[1], 80))
    steps = []
    for token in next_tokens(40, "cuda"):
        positions = small.sequences.lengths[:, None].long()
        logits = [model(token, position_ids=positions, past_key_values=cache).logits for cache in (small, large)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        if small.session.step not in steps:
            steps.append(small.session.step)
    assert None not in steps and len(steps) == 3  # 20, 30, 45 and 67 tokens
    assert small.capacity == 67


CHANGES = {
    "replaced": lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight.detach() * 2)),
    "swapped": lambda m: setattr(m.model.layers[4].mlp.down_proj.weight, "data", torch.ones(96, 64).cuda()),
    "one of those that lie together": lambda m: setattr(
        m.model.layers[4].self_attn.k_proj.weight, "data", torch.ones(32, 96).cuda()
    ),
    "in place": lambda m: m.load_state_dict({name: value * 1.1 for name, value in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True),
    "there and back": lambda m: m.cpu().load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}) and m.cuda(),
    "another module": lambda m: setattr(
        m.model.layers[4].self_attn, "o_proj", torch.nn.Linear(96, 96, bias=False, device="cuda")
    ),
    "a hook": lambda m: m.model.layers[4].mlp.register_forward_hook(lambda module, args, output: output * 2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_step_uses_changed_weights(gpu_model, tiny, change):
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    cache, tokens = read_prompt(model, plan, 80), next_tokens(3, "cuda")
    before = model(tokens[0], past_key_values=cache).logits
    cache.crop(-1)
    assert torch.equal(model(tokens[0], past_key_values=cache).logits, before)
    CHANGES[change](model)
    cache.crop(-1)
    after = model(tokens[0], past_key_values=cache).logits
    assert cache.session.step is not None
    cache.crop(-1)
    with uncaptured(cache):
        torch.testing.assert_close(after, model(tokens[0], past_key_values=cache).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_two_threads_generate_what_each_gives_alone(gpu_model, tiny):
    """The graphs of both are captured while the other one runs."""
    plan = PLANS["paper"](tiny().config)
    prompts = [PROMPT[:1].cuda(), PROMPT[1:].flip(1).cuda()]
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options = [{**options, "lossless": 4}, options]
    expected = [gpu_model(plan).generate(ids, **extra) for ids, extra in zip(prompts, options, strict=True)]
    model = gpu_model(plan)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(model.generate, ids, **extra) for ids, extra in zip(prompts, options, strict=True)]
        outputs = [job.result() for job in jobs]
    assert all(map(torch.equal, outputs, expected))


def test_memory_is_looked_at_before_a_cache_is_allocated(monkeypatch):
    free = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    layer = TidalLayer(Sequences(100_000), num_layers=10, first=True)

    class States:
        """The little that is asked of K and V on a GPU: 1 sequence, 4 heads, head dim 64, float32."""

        device, shape, element_size = torch.device("cuda", 0), (1, 4, 1, 64), staticmethod(lambda: 4)

    with pytest.raises(
        InputError, match=r"1 x 100,000 tokens in 10 layers needs 1\.9 GiB, and 1\.0 GiB .* 52,428 tokens"
    ):
        layer.prepare(States(), States())
    free = 2**40
    layer.check_memory(States(), States(), 100_000)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "reason"),
    [
        (torch.float64, 64, (9, 0), "no kernels for float64"),
        (torch.bfloat16, 512, (9, 0), "no kernels for head dim 512"),
        (torch.float16, 64, (7, 5), "Tesla T4 is too old"),
    ],
)
def test_what_has_no_kernel_is_said_once(monkeypatch, caplog, dtype, head_dim, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    ops._told_obstacle.cache_clear()
    with caplog.at_level(logging.WARNING, "tidaldecode"):
        for _ in range(2):
            assert ops._told_obstacle(torch.device("cuda", 0), dtype, head_dim) is not None
        assert ops._told_obstacle(torch.device("cuda", 0), torch.float16, 64) is None or capability == (7, 5)
    assert len(caplog.records) == 1 and reason in caplog.text
    ops._told_obstacle.cache_clear()


@pytest.mark.gpu
def test_a_cache_that_does_not_fit_says_how_much_is_needed(gpu_model, tiny):
    plan = PLANS["paper"](tiny().config)
    model = gpu_model(plan)
    with pytest.raises(InputError, match=r"needs [\d.]+ GiB, and [\d.]+ GiB of the GPU are free: [\d,]+ tokens fit"):
        read_prompt(model, plan, 2**33)
