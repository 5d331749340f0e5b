"""`calibrate`: what it measures against plain formulas, what the search finds against all there is, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import assert_one_line
from families import LAYERS
from tidaldecode import InputError, TidalCache, TidalPlan, apply
from tidaldecode.calibrate.allocation import FULL, SPARSE, Allocator
from tidaldecode.calibrate.allocation_search import AllocationSearch
from tidaldecode.calibrate.assignment import Assignment
from tidaldecode.calibrate.attention_weights import ChosenSets
from tidaldecode.calibrate.calibration import calibrate
from tidaldecode.calibrate.calibration_run import CalibrationRun
from tidaldecode.calibrate.loss import Loss, mean_loss
from tidaldecode.calibrate.lost_mass import measure_lost_mass
from tidaldecode.calibrate.questions import check_questions, prompts
from tidaldecode.calibrate.search import Layers, Search
from tidaldecode.calibrate.settings import CalibrationSettings, Probes, check_apart
from tidaldecode.calibrate.stretches import Stretch, with_probes
from tidaldecode.methods.method import Method
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models import check_plan, model_shape
from tidaldecode.plan import ModelShape
from tidaldecode.plans.find import find_plan
from tidaldecode.report.folder import read_results
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import Windows

RULES = ("unified", "per_group", "per_head")
PROBES = Probes(count=2, tokens=6)
CONTEXT, DECODE, BUDGET = 90, 10, 16
FIRST = CONTEXT - DECODE - PROBES.steps  # tokens that the first decode step sees


def text(seed=0, tokens=1200):
    return Text(torch.randint(2, 260, (tokens,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32))


def settings(**changes):
    small = {
        "context": CONTEXT, "decode": DECODE, "windows": 2, "heldout_windows": 2, "heldout_decode": 8,
        "budgets": (BUDGET,), "probes": PROBES,
    }  # fmt: skip
    wanted = {} if {"max_gap", "max_read"} & changes.keys() else {"select_layers": 2}
    return CalibrationSettings(**{**small, **wanted, **changes})


def stretches_of(model, starts=(3, 300), probes=PROBES, seed=5):
    generator = torch.Generator().manual_seed(seed)
    windows = [text().window(start, CONTEXT - probes.steps) for start in starts]
    windows = [with_probes(window, DECODE, probes, generator) for window in windows]
    return [Stretch.read(model, window, DECODE, probes.steps) for window in windows]


PLAN = TidalPlan(
    roles=("full", "select", "sparse", "sparse", "select", "sparse", "sparse"), selection="per_group",
    token_budget=BUDGET, sink_tokens=2, recent_tokens=3,
)  # fmt: skip


# ---- stretches of a text and their loss


def test_a_stretch_holds_the_text_and_says_parts_of_itself_again(tiny):
    model = apply(tiny(), "full")
    for stretch, start in zip(stretches_of(model), (3, 300), strict=True):
        assert stretch.cache.get_seq_length() == FIRST - 1
        window = text().tokens[start : start + CONTEXT].tolist()
        steps = stretch.tokens[0].tolist()
        assert len(steps) == DECODE + PROBES.steps + 1 and stretch.text_steps == DECODE
        assert steps[: DECODE + 1] == window[FIRST - 1 : FIRST + DECODE]
        read = window[: FIRST - 1]
        places = []
        for first in range(DECODE + 1, len(steps), PROBES.tokens):
            said = steps[first : first + PROBES.tokens]
            places += [place for place in range(len(read)) if read[place : place + PROBES.tokens] == said]
        assert len(places) == 2
        assert min(places) < len(read) / 2 <= max(places) + PROBES.tokens  # one of each half


def test_the_loss_is_that_of_real_steps(tiny):
    model = apply(tiny().double(), "full")
    stretches = stretches_of(model)
    divergences, gaps = [], []
    for stretch in stretches:
        log_probs = []
        for plan in (find_plan("full", model.config), PLAN):
            cache = TidalCache(model.config, plan, CONTEXT)
            start = (3, 300)[len(gaps) // DECODE]
            ids = text().tokens[start : start + FIRST - 1][None].long()
            model(ids, past_key_values=cache)
            steps = [
                model(stretch.tokens[:, step : step + 1], past_key_values=cache).logits[0, -1]
                for step in range(stretch.steps)
            ]
            log_probs.append(torch.stack(steps).log_softmax(1))
        full, plan = log_probs
        divergences += (full.exp() * (full - plan)).sum(1).tolist()
        tokens = stretch.tokens[0, 1 : DECODE + 1, None]
        gaps += (full - plan)[:DECODE].gather(1, tokens)[:, 0].tolist()
    steps = DECODE + PROBES.steps
    of_text = divergences[:DECODE] + divergences[steps : steps + DECODE]
    expected = Loss(*(sum(values) / len(values) for values in (divergences, of_text, gaps)))
    found = mean_loss(stretches, DecodeAttention(PLAN, model_shape(model.config)))
    assert found.divergence == pytest.approx(expected.divergence, abs=1e-5) and found.divergence > 0.01
    assert found.text_divergence == pytest.approx(expected.text_divergence, abs=1e-5)
    assert found.gap == pytest.approx(expected.gap, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_stretch_serves_one_plan_after_another(tiny, family):
    model = apply(tiny(family), "full")
    stretches = stretches_of(model)
    shape = model_shape(model.config)
    full = DecodeAttention(find_plan("full", model.config), shape)
    paper = DecodeAttention(find_plan("paper", model.config).with_budget(BUDGET), shape)
    first = mean_loss(stretches, paper)
    nothing = mean_loss(stretches, full)
    assert (nothing.divergence, nothing.text_divergence, nothing.gap) == pytest.approx((0, 0, 0), abs=1e-6)
    assert mean_loss(stretches, paper) == first and first.divergence > 1e-3


# ---- lost mass


@pytest.mark.parametrize(("family", "sinks", "recent"), [("llama", 0, 1), ("qwen2", 2, 4), ("gemma3_text", 1, 3)])
def test_lost_mass_equals_the_formula_on_dense_attention(tiny, family, sinks, recent):
    model = apply(tiny(family).double(), "full")
    sets = ChosenSets(RULES, BUDGET, sinks, recent)
    found = measure_lost_mass(stretches_of(model, probes=Probes(0, 6)), sets)
    shape = model_shape(model.config)
    dense = tiny(family).double()
    dense.set_attn_implementation("eager")
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * shape.num_layers
    layers = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    expected = torch.full_like(found, torch.inf)
    steps = range(CONTEXT - DECODE - 1, CONTEXT - 1)
    for j, i in ((j, i) for j in layers for i in layers if i < j):
        expected[j, i] = 0
    for start in (3, 300):
        ids = text().tokens[start : start + CONTEXT][None].long()
        weights = dense(ids, use_cache=False, output_attentions=True).attentions
        for (j, i), step in itertools.product([(j, i) for j in layers for i in layers if i < j], steps):
            forced = [*range(sinks), *range(step + 1 - recent, step + 1)]
            for number, (rule, head) in enumerate(sets.of(shape)):
                size = shape.num_query_heads // shape.num_sets(rule)
                mean = weights[i][0, head * size : (head + 1) * size, step, : step + 1].mean(0)
                others = [token for token in mean.argsort(descending=True).tolist() if token not in forced]
                chosen = forced + others[: BUDGET - len(forced)]
                lost = 1 - weights[j][0, :, step, chosen].sum(1)
                expected[j, i, number] += lost / (2 * DECODE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[found.isfinite()].mean() > 0.1


# ---- from lost mass to a plan


SHAPE = ModelShape(num_layers=6, num_query_heads=4, num_kv_heads=2, head_dim=8)
SETS = ChosenSets(("unified", "per_head"), 8).of(SHAPE)


def lost_mass(seed=0):
    """Random lost mass of two rules; infinite where no layer below can choose."""
    values = torch.rand(6, 6, len(SETS), 4, generator=torch.Generator().manual_seed(seed))
    values[torch.ones(6, 6).triu().bool()] = torch.inf
    return values


@pytest.mark.parametrize("per_query_head", [False, True])
def test_each_reader_gets_the_set_that_loses_least(per_query_head):
    lost = lost_mass()
    assignment = Assignment.of(SHAPE, range(6), lost, SETS, per_query_head)
    reading, select = frozenset({0, 1, 3}), frozenset({1, 3})
    plan = TidalPlan(
        model=SHAPE, roles=assignment.roles(reading, select), selection="unified", token_budget=8,
        sources=assignment.sources(reading, select),
    )  # fmt: skip
    assert plan.roles == ("full", "select", "sparse", "select", "sparse", "sparse")
    total = 0.0
    for layer, sources in plan.sources.items():
        for heads in [(0,), (1,), (2,), (3,)] if per_query_head else [(0, 1), (2, 3)]:
            costs = {
                (below, SETS[number]): sum(lost[layer, below, number, head].item() for head in heads)
                for below in select
                if below < layer
                for number in range(5)
            }
            best = min(costs, key=costs.__getitem__)
            assert {(sources[head].layer, (sources[head].selection, sources[head].head)) for head in heads} == {best}
            total += costs[best]
    assert assignment.predicted(reading, select) == pytest.approx(total)


def test_a_layer_without_a_source_can_not_be_sparse():
    assignment = Assignment.of(SHAPE, range(6), lost_mass(), SETS, False)
    assert math.isinf(assignment.predicted(frozenset({1, 3}), frozenset({1, 3})))
    assert math.isfinite(assignment.predicted(frozenset({0, 3}), frozenset({0, 3})))
    assert assignment.predicted(frozenset(range(6)), frozenset()) == 0


def test_the_layers_that_are_missed_least_do_not_select():
    assignment = Assignment.of(SHAPE, range(6), lost_mass(), SETS, False)
    reading = frozenset({0, 1, 2, 4})
    read = {source.layer for heads in assignment.sources(reading, reading).values() for source in heads}
    assert assignment.select_layers(reading, 4) == read
    one = assignment.select_layers(reading, 1)
    assert len(one) == 1
    best = min(assignment.predicted(reading, frozenset({layer})) for layer in reading)
    three = assignment.select_layers(reading, 3)
    assert assignment.predicted(reading, three) <= assignment.predicted(reading, one)
    assert assignment.predicted(reading, one) <= 1.2 * best  # greedy: near the best


# ---- the search


def search_of(seed, weights, shape=None, full_layers=0):
    """A search whose true loss is lost mass times weights that it does not know."""
    assignment = Assignment.of(SHAPE, range(6), lost_mass(seed), SETS, False)

    def measure(layers):
        return float((assignment.losses(layers.reading, layers.select) * weights).sum())

    return Search(assignment, measure, full_layers), measure


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_layers(seed):
    weights = torch.rand(6, generator=torch.Generator().manual_seed(seed + 50)).double() ** 3
    search, measure = search_of(seed, weights)
    for layers in search.sizes(2, 4):
        size = len(layers.reading)
        possible = [frozenset({0, *rest}) for rest in itertools.combinations(range(1, 6), size - 1)]
        assert measure(layers) == pytest.approx(min(measure(Layers(reading, reading)) for reading in possible))
    assert len(search.measured) < 5 + 10 + 10 + 6


def test_the_search_learns_which_layers_matter():
    weights = torch.tensor([1, 1, 9, 1, 1, 0.1]).double()
    search, _ = search_of(0, weights)
    list(search.sizes(2, 4))
    fitted = search.assignment.weights
    assert fitted[2] > 2 * fitted[3] and fitted[5] < fitted[3]


def test_full_layers_do_not_select():
    search, _ = search_of(1, torch.ones(6).double(), full_layers=2)
    for layers in search.sizes(3, 5):
        assert len(layers.select) <= len(layers.reading) - 2


def test_the_search_keeps_to_its_tries():
    search, _ = search_of(2, torch.rand(6).double())
    search.tries, search.most_tries = 3, 4
    sizes = [len(search.measured) for _ in search.sizes(2, 4)]
    assert sizes[0] <= 4 and sizes[1] <= 8 and sizes[2] <= 12


# ---- allocation of a share


BUDGETS = (8, 16, 32)


def allocator_of(seed, weights=None, per_query_head=False):
    """Random lost mass that gets less with the budget, and least by a layer's own choice."""
    generator = torch.Generator().manual_seed(seed)
    lost = torch.rand(6, 6, len(SETS), 4, generator=generator) * (1 + 3 * torch.rand(6, 1, 1, 1, generator=generator))
    lost[torch.arange(6), torch.arange(6)] *= 0.3
    lost[torch.ones(6, 6).triu(1).bool()] = torch.inf
    by_budget = {budget: lost * (8 / budget) ** 0.5 for budget in BUDGETS}
    allocator = Allocator.of(SHAPE, range(6), by_budget, SETS, per_query_head, 400, 0.05)
    return allocator if weights is None else dataclasses.replace(allocator, weights=weights)


@pytest.mark.parametrize("per_query_head", [False, True])
def test_what_an_allocation_says_is_what_its_plan_reads_and_loses(per_query_head):
    allocator = allocator_of(0, per_query_head=per_query_head)
    allocation = allocator.allocation([FULL, 0, SPARSE, 2, SPARSE, 1], 0.01)
    budgets = allocator.budgets_of(allocation)
    assert budgets == {1: 8, 3: 32, 5: 16}
    plan = TidalPlan(
        model=SHAPE, roles=allocator.roles(allocation), selection="unified", key_bits=2, token_budget=8,
        budgets={3: 32, 5: 16}, sources=allocator.sources(allocation),
    )  # fmt: skip
    assert plan.roles == ("full", *["quantized_select", "sparse"] * 2, "quantized_select")
    reads = DecodeAttention(plan, SHAPE).tokens_read(400)
    codes = dict.fromkeys(budgets, 400 * 4 / 32)  # 2 bits of 8 channels and a factor, of 32 bytes of K and V
    without = sum(reads.values()) - sum(codes.values())
    assert without == pytest.approx((allocation.share * 6 - 0.05 * 3) * 400)
    by_budget = {budget: allocator_of(0, per_query_head=True).lost[place] for place, budget in enumerate(BUDGETS)}
    for layer, sources in plan.sources.items():
        lost = [by_budget[budgets[source.layer]][layer, source.layer, head] for head, source in enumerate(sources)]
        if per_query_head:
            assert sum(lost) == pytest.approx(allocation.losses[layer])
    assert allocation.losses[0] == 0


def test_a_layer_whose_choice_nobody_reads_has_no_codes():
    allocator = allocator_of(0)
    lost = allocator.lost.copy()
    lost[:, :, 3] = 100.0  # the choice of layer 3 serves nobody, itself included
    allocation = dataclasses.replace(allocator, lost=lost).allocation([0, 0, 0, 0, 0, 0], 0.0)
    assert allocation.states[3] == SPARSE and allocation.states.count(SPARSE) == 1


def test_a_layer_that_nothing_below_chose_for_is_no_allocation():
    assert allocator_of(0).allocation([SPARSE, 0, 0, 0, 0, 0], 0.0) is None
    assert allocator_of(0).allocation([FULL, SPARSE, 0, 0, 0, 0], 0.0) is None
    assert allocator_of(0).allocation([FULL] * 6, 0.0).share == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [0.06, 0.12, 0.3])
def test_the_best_allocation_is_near_the_best_of_all(seed, most):
    """Against all 5 ** 5 states of five layers above one that chooses, each with the same price of readers' sets."""
    weights = np.random.default_rng(seed).random(6) + 0.1
    allocator = allocator_of(seed, weights)
    found, price = allocator.best_within(most)
    assert found.share <= most
    options = (allocator.allocation([0, *rest], price) for rest in itertools.product(range(FULL, 3), repeat=5))
    best = min(allocator.predicted(option) for option in options if option is not None and option.share <= most)
    assert allocator.predicted(found) <= 1.15 * best


def test_the_search_for_an_allocation_learns_which_layers_matter():
    weights = np.array([1, 1, 9, 1, 1, 0.1])
    truth = allocator_of(1, weights)
    search = AllocationSearch(allocator_of(1), truth.predicted)
    best = search.best_within(0.1)
    assert best.share <= 0.1
    known, _ = truth.best_within(0.1)
    assert truth.predicted(best) <= 1.05 * truth.predicted(known)
    assert len(search.measured) == len({allocation.key for allocation, _ in search.measured})
    search.most_tries = 3
    before = len(search.measured)
    search.best_within(0.2)
    assert len(search.measured) <= before + 3
    assert AllocationSearch(allocator_of(1), truth.predicted).best_within(0.001) is None


# ---- calibration


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt_neox", "qwen3"])
def test_other_families(tiny, family, tmp_path):
    """Runs through, and what it finds is a valid plan that loses what it says."""
    model = apply(tiny(family), "full")
    found = calibrate(model, text(), text(1), settings())
    plan = found.chosen.plan
    check_plan(plan, model.config)
    plan.save(tmp_path / "plan.json")
    assert TidalPlan.load(tmp_path / "plan.json") == plan
    assert plan.roles.count("select") in (1, 2) and plan.roles.count("full") >= 2
    assert [role for role in plan.roles if role is not None].count("sparse") == plan.roles.count("sparse") > 0
    assert found.tried > 10 and not found.stopped
    assert found.chosen.heldout_gap is not None and found.chosen.heldout_error > 0
    stretches = stretches_of(model, settings().starts(text()), seed=0)
    loss = mean_loss(stretches, DecodeAttention(plan, model_shape(model.config)))
    assert loss.divergence == pytest.approx(found.chosen.loss.divergence, rel=1e-4)


def test_questions_about_few_windows_differ(byte_tokenizer):
    asked = list(prompts(byte_tokenizer, text(tokens=600), (0, 300), 250, 8))
    assert len(set(asked)) == 8 and max(map(len, asked)) <= 250
    with pytest.raises(InputError, match="leave none of a context of 80 for the document: .* ask none, --answers 0"):
        check_questions(byte_tokenizer, text(), text(1), settings())


def test_results_say_what_was_looked_for():
    of = {"max_gap": None, "select_layers": 1, "full_layers": 0}
    assert of.items() <= settings(select_layers=1, full_layers=0).to_json().items()
    of = {"max_read": 0.4, "select_layers": None, "full_layers": None, "key_bits": 2}
    assert of.items() <= settings(max_read=0.4).to_json().items()


def test_full_attentions_own_answers_choose_the_plan_too(tiny, byte_tokenizer):
    model = apply(tiny(), "full")
    wanted = settings(context=300, answers=3, heldout_windows=1)
    run = CalibrationRun(model, wanted, lambda *what: None, byte_tokenizer)
    run.read(text())
    assert len(run.stretches) == 2 + 3
    for stretch in run.stretches[2:]:
        assert stretch.text_steps == 0 and 1 <= stretch.steps <= wanted.decode
        prompt = stretch.cache.get_seq_length() + 1
        assert prompt <= 300 - wanted.decode and stretch.tokens.shape == (1, stretch.steps + 1)
    losses = [mean_loss([stretch], DecodeAttention(PLAN, run.shape)) for stretch in run.stretches]
    both = mean_loss(run.stretches, DecodeAttention(PLAN, run.shape))
    steps = [stretch.steps for stretch in run.stretches]
    weighed = sum(loss.divergence * number for loss, number in zip(losses, steps, strict=True)) / sum(steps)
    assert both.divergence == pytest.approx(weighed, rel=1e-5)
    assert both.text_divergence == pytest.approx(sum(loss.text_divergence for loss in losses[:2]) / 2, rel=1e-5)
    assert calibrate(model, text(), text(1), wanted).chosen.heldout_surprise is None  # without a tokenizer


def test_the_seed_decides(tiny):
    model = apply(tiny(), "full")
    first, second, other = (calibrate(model, text(), text(1), settings(seed=seed)) for seed in (3, 3, 4))
    assert first == second
    assert first.chosen.loss != other.chosen.loss


def test_the_frontier_loses_less_the_more_it_reads(tiny):
    found = calibrate(apply(tiny(), "full"), text(), text(1), settings(select_layers=3, full_layers=1))
    reads = [point.kv_read_fraction for point in found.frontier]
    losses = [point.loss.divergence for point in found.frontier]
    assert reads == sorted(set(reads)) and losses == sorted(set(losses), reverse=True)
    assert found.chosen is found.frontier[-1]
    assert all(point.heldout_gap is not None for point in found.frontier)


def test_the_held_out_gap_is_that_of_eval_ppl(tiny):
    from tidaldecode.evaluate.perplexity import perplexity
    from tidaldecode.evaluate.study import measure

    model = apply(tiny(), "full")
    found = calibrate(model, text(), text(1), settings())
    method = Method.named("tidal", None, found.chosen.plan)
    _, row = measure(perplexity(text(1), settings().heldout(text(1)), [method]), model)
    assert (found.chosen.heldout_gap, found.chosen.heldout_error) == (row.gap, row.gap_stderr)


def test_the_cheapest_plan_within_a_gap(tiny):
    model = apply(tiny(), "full")
    wanted = settings(max_gap=0.3, budgets=(10, BUDGET, 32))
    found = calibrate(model, text(), text(1), wanted)
    assert found.chosen.loss.text_divergence <= 0.3 and found.chosen.kv_read_fraction < 1
    cheaper = [point for point in found.frontier if point.kv_read_fraction < found.chosen.kv_read_fraction]
    assert cheaper and all(point.loss.text_divergence > 0.3 for point in cheaper)
    assert {point.plan.token_budget for point in found.frontier} > {found.chosen.plan.token_budget}
    assert found.chosen.heldout_gap is not None


def test_the_best_plan_that_reads_a_share(tiny, tmp_path):
    model = apply(tiny(), "full")
    wanted = settings(max_read=0.4, budgets=(10, BUDGET, 32), tries=4)
    found = calibrate(model, text(), text(1), wanted)
    plan = found.chosen.plan
    assert found.chosen.kv_read_fraction <= 0.4 and found.chosen.heldout_gap is not None
    assert plan.roles.count("quantized_select") and plan.key_bits == 2 and plan.sink_tokens and plan.recent_tokens
    plan.save(tmp_path / "plan.json")
    assert TidalPlan.load(tmp_path / "plan.json") == plan
    stretches = stretches_of(model, wanted.starts(text()), seed=0)
    loss = mean_loss(stretches, DecodeAttention(plan, model_shape(model.config)))
    assert loss.divergence == pytest.approx(found.chosen.loss.divergence, rel=1e-4)
    cheaper = calibrate(model, text(), text(1), settings(max_read=0.2, budgets=(10, BUDGET), tries=4))
    assert cheaper.chosen.kv_read_fraction <= 0.2 and cheaper.chosen.loss.divergence > loss.divergence


def test_the_cheapest_plan_with_codes_within_a_gap(tiny):
    wanted = settings(max_gap=0.25, key_bits=2, budgets=(10, BUDGET, 32), tries=3)
    found = calibrate(apply(tiny("gemma3_text"), "full"), text(), text(1), wanted)
    assert found.chosen.loss.text_divergence <= 0.25 and len(found.frontier) > 1
    assert all(point.loss.text_divergence > 0.25 for point in found.frontier if point is not found.chosen)


def test_a_share_that_no_plan_reads_is_told(tiny):
    with pytest.raises(InputError, match="no plan reads as little as 1.0% of K and V: .* it is 1[0-9]"):
        settings(max_read=0.01).check(tiny().config)
    with pytest.raises(InputError, match="codes of 1 bits of 12 channels fill no whole bytes"):
        settings(max_read=0.4, key_bits=1).check(tiny(head_dim=12).config)


def test_no_plan_within_a_gap(tiny):
    found = calibrate(apply(tiny(), "full"), text(), text(1), settings(max_gap=1e-9))
    assert found.chosen is found.frontier[-1] and found.chosen.loss.text_divergence > 1e-9


def test_a_gap_that_is_met_early_ends_the_search(tiny):
    model = apply(tiny(), "full")
    generous = calibrate(model, text(), text(1), settings(max_gap=5.0))
    assert generous.chosen.loss.text_divergence <= 5 and generous.chosen.plan.roles.count("sparse") == LAYERS - 1
    assert generous.tried < calibrate(model, text(), text(1), settings(max_gap=0.2)).tried


@pytest.mark.parametrize("changes", [{"windows": 1, "heldout_windows": 1}, {"select_layers": 1, "full_layers": 0}])
def test_the_smallest_calibrations(tiny, changes):
    found = calibrate(apply(tiny("gpt_neox"), "full"), text(), text(1), settings(per_query_head=True, **changes))
    check_plan(found.chosen.plan, tiny("gpt_neox").config)
    assert (found.chosen.heldout_error is None) == ("windows" in changes)


def test_two_layers_and_a_gap(tiny):
    model = apply(tiny(num_hidden_layers=2), "full")
    assert calibrate(model, text(), text(1), settings(max_gap=5.0)).chosen.plan.roles == ("select", "sparse")


def test_damaged_weights_are_told_before_the_search(tiny):
    model = tiny()
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(InputError, match="the likelihood is not finite: the model's weights are damaged"):
        calibrate(apply(model, "full"), text(), text(1), settings())


def test_a_plan_that_overflows_is_not_chosen(tiny, monkeypatch):
    from tidaldecode.calibrate import calibration_run

    losses = iter([math.nan] * 9)
    monkeypatch.setattr(
        calibration_run,
        "mean_loss",
        lambda *arguments: Loss(next(losses, None) or mean_loss(*arguments).divergence, 1.0, 1.0),
    )
    found = calibrate(apply(tiny(), "full"), text(), text(1), settings())
    assert all(math.isfinite(point.loss.divergence) for point in found.frontier)


def test_a_check_that_fails_keeps_the_plan(tiny, monkeypatch, caplog):
    from tidaldecode.calibrate import calibration_run

    def fail(*arguments):
        raise InputError("the KV cache does not fit")

    monkeypatch.setattr(calibration_run, "perplexity", fail)
    found = calibrate(apply(tiny(), "full"), text(), text(1), settings())
    assert found.stopped and found.chosen.heldout_gap is None and "the KV cache does not fit" in caplog.text


@pytest.mark.parametrize("stop", ["shares", "search", "check"])
def test_an_interrupted_calibration_keeps_the_best_plan(tiny, stop):
    model = apply(tiny(), "full")
    seen = []

    def on_progress(done, total, what):
        seen.append(what)
        if len([word for word in seen if "plans in which" in word]) == 6 and stop == "search":
            raise KeyboardInterrupt
        if "held-out" in what and stop == "check":
            raise KeyboardInterrupt
        if seen.count("sinks and recent tokens") == 3 and stop == "shares":
            raise KeyboardInterrupt

    found = calibrate(model, text(), text(1), settings(), on_progress)
    assert found.stopped and found.chosen.heldout_gap is None
    check_plan(found.chosen.plan, model.config)
    if stop == "search":
        assert seen[-1].startswith("plans in which") and "best so far" in seen[-1]


def test_interrupted_before_any_plan(tiny):
    def on_progress(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(apply(tiny(), "full"), text(), text(1), settings(), on_progress)


@pytest.mark.parametrize("changes", [{}, {"max_read": 0.4, "tries": 2, "context": 300, "heldout_windows": 1}])
def test_progress(tiny, byte_tokenizer, changes):
    told = []
    asks = {"tokenizer": byte_tokenizer} if changes else {}
    calibrate(apply(tiny(), "full"), text(), text(1), settings(**changes), lambda *what: told.append(what), **asks)
    done = [done for done, _, _ in told]
    assert done == sorted(done)
    assert all(done <= total for done, total, _ in told)
    assert told[-1][0] == told[-1][1] and "reading window 1 of 2" in told[0][2]


# ---- settings


def test_windows_are_apart_and_follow_the_seed():
    lines = text(tokens=1000)
    places = {settings(windows=5, seed=seed).starts(lines) for seed in range(5)}
    assert len(places) > 1
    for starts in places:
        assert all(after - before >= CONTEXT for before, after in itertools.pairwise(starts))
        assert starts[0] >= 0 and starts[-1] + CONTEXT <= 1000
    assert settings(windows=5).starts(text(tokens=450)) == (0, 90, 180, 270, 360)
    checked = settings(heldout_windows=5).heldout(lines)
    assert checked.starts == (0, 227, 454, 681, 908) and checked.context == CONTEXT


def test_wrong_settings(tiny):
    for changes, message in (
        ({"max_gap": 0.1, "select_layers": 2}, "give --select-layers or --max-gap, not both"),
        ({"max_gap": 0.1, "full_layers": 0}, "give --full-layers or --max-gap, not both"),
        ({"max_gap": -1.0}, "must be positive"),
        ({"max_read": 0.1, "select_layers": 2}, "give --select-layers or --max-read, not both"),
        ({"max_read": 0.1, "max_gap": 0.1}, "give --max-gap or --max-read, not both"),
        ({"max_read": 1.5}, "a largest share of 1.5 must lie between 0 and 1"),
        ({"max_read": 0.1, "key_bits": 3}, "codes of 3 bits: there are those of 1, 2, 4"),
        ({"budgets": (16, 32)}, "several budgets need --max-gap or --max-read"),
        ({"budgets": (1,)}, "budget 1 is too small: 4 sinks, half of it recent tokens and a chosen one make 9"),
        ({"budgets": (8, 64), "max_gap": 0.1}, "budget 8 is too small"),
        ({"budgets": (FIRST,)}, f"budget {FIRST} leaves nothing to calibrate: .* context of {FIRST} tokens"),
        ({"decode": 60}, "a context of 90 tokens is too short for 60 decode steps and the 12 of the probes"),
    ):
        with pytest.raises(InputError, match=message):
            settings(**changes)
    model = apply(tiny(), "full")
    for changes, message in (
        ({"select_layers": 5}, f"2 full and 5 select layers leave no sparse one among the {LAYERS} layers"),
        ({"windows": 14}, "1200 tokens, 60 too few for 14 windows of 90"),
        ({"heldout_windows": 14}, "held-out text has 1200 tokens, 60 too few for 14 windows"),
        ({"context": 600, "windows": 1, "heldout_windows": 1}, "beyond the model's 512 positions"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(model, text(), text(1), settings(**changes))


def test_a_model_without_a_layer_that_can_have_a_role(tiny):
    config = tiny("gemma3_text").config
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    with pytest.raises(InputError, match="all its layers attend to a sliding window"):
        settings().check(config)


def test_texts_that_overlap():
    lines, windows = text(), Windows(300, DECODE, 1, 30, 1)
    shifted = Text(torch.cat([text(1, 200).tokens, lines.tokens[110:400]]))
    with pytest.raises(InputError, match="overlaps"):  # 130 tokens of the window that begins at 100
        check_apart(lines, (100,), shifted, windows)
    header = Text(torch.cat([lines.tokens[100:220], text(1).tokens]))
    check_apart(lines, (100,), header, Windows(300, DECODE, 1, 0, 1))
    with pytest.raises(InputError, match="overlaps"):
        check_apart(lines, (100,), lines, Windows(300, DECODE, 1, 250, 1))
    check_apart(lines, settings().starts(lines), text(1), settings().heldout(text(1)))


# ---- the command


@pytest.fixture
def command(tiny_folder, tmp_path):
    """A run that takes a few seconds."""
    words = text(7, 4000).tokens
    (tmp_path / "text.txt").write_text("".join(chr(97 + token % 26) for token in words.tolist()))
    return [
        "calibrate", "--model", str(tiny_folder), "--text", str(tmp_path / "text.txt"), "--context", "400",
        "--decode", "20", "--windows", "2", "--heldout-windows", "2", "--budget", "32", "--select-layers", "2",
        "--output", str(tmp_path / "plan.json"),
    ]  # fmt: skip


def test_the_command(run, command, tmp_path):
    status, out, err = run(*command, "--results", str(tmp_path / "new" / "results"), "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert answer == json.loads((tmp_path / "new" / "results" / "calibration.json").read_text())
    assert {"command", "versions", "device", "model", "seed", "seconds", "plan", "heldout_gap"} <= answer.keys()
    plan = TidalPlan.load(tmp_path / "plan.json")
    assert json.loads(plan.to_json()) == answer["plan"]
    made = plan.calibration
    assert (made.text, made.heldout_text) == ("text.txt, first half", "text.txt, second half")
    assert (made.context, made.windows, made.decode, made.seed) == (400, 2, 20, 0)
    assert made.calibration_gap == pytest.approx(answer["calibration_gap"], abs=1e-5)
    assert made.heldout_gap == pytest.approx(answer["heldout_gap"], abs=1e-5)
    assert made.kv_read_fraction == pytest.approx(answer["kv_read_fraction"], abs=1e-5)
    assert made.heldout_surprise == pytest.approx(answer["heldout_surprise"], abs=1e-5)
    assert "answers about the held-out text" in err
    assert plan.token_budget == 32 and plan.model.num_layers == LAYERS and str(tmp_path) not in plan.to_json()
    assert [row["select_layers"] for row in answer["frontier"]] == sorted(
        row["select_layers"] for row in answer["frontier"]
    )
    assert Path(answer["figure"]).read_bytes()[:4] == b"\x89PNG"
    (result,), skipped = read_results(tmp_path / "new")
    assert (result.kind, skipped) == ("calibration", [])
    assert "plan.json" in err and "held-out" in err
    # and the plan is one that the other commands take
    arguments = ["--model", command[2], "--plan", str(tmp_path / "plan.json"), "--max-new-tokens", "3", "--json"]
    status, out, err = run("generate", "a b c", *arguments)
    assert status == 0, err


def test_an_interrupted_command_writes_the_best_plan(run, command, tmp_path, monkeypatch):
    from tidaldecode.calibrate import calibration_run

    tried = []

    def stopping(*arguments):
        tried.append(arguments)
        if len(tried) > 9:
            raise KeyboardInterrupt
        return mean_loss(*arguments)

    monkeypatch.setattr(calibration_run, "mean_loss", stopping)
    status, out, err = run(*command, "--json")
    assert status == 130 and "stopped" in err
    assert json.loads(out)["stopped"] is True and json.loads(out)["heldout_gap"] is None
    plan = TidalPlan.load(tmp_path / "plan.json")
    assert plan.calibration.heldout_gap is None and plan.calibration.loss > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--select-layers", "5"], ["2 full and 5 select layers leave no sparse one among the 7 layers"]),
        (["--max-gap", "0.1"], ["--select-layers or --max-gap"]),
        (["--key-bits", "2"], ["--select-layers or --key-bits"]),
        (["--answers", "99"], ["--answers 99: of 2 windows 8 are asked at most", "--answers 0"]),
        (["--budget", "5"], ["budget 5 is too small", "make 9"]),
        (["--budget", "16,32"], ["several budgets need --max-gap or --max-read"]),
        (["--budget", "300"], ["budget 300 leaves nothing to calibrate", "context of 284 tokens"]),
        (["--budget", "0.1"], ["--budget '0.1'"]),
        (["--selection", "best"], ["--selection 'best' is unknown"]),
        (["--text", "nowhere.txt"], ["nowhere.txt does not exist"]),
        (["--heldout-text", "nowhere.txt"], ["nowhere.txt does not exist"]),
        (["--windows", "6"], ["2000 tokens, 400 too few for 6 windows of 400"]),
        (["--heldout-windows", "6"], ["held-out text has 2000 tokens, 400 too few"]),
        (["--context", "600"], ["600 tokens is beyond the model's 512 positions"]),
        (["--output", "nowhere/plan.json"], ["--output nowhere/plan.json", "does not exist"]),
        (["--model", "./nowhere"], ["./nowhere does not exist"]),
    ],
)
def test_bad_input_before_the_model_is_loaded(run, command, options, words, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    assert_one_line(run(*command, *options), *words)


def test_a_held_out_text_that_overlaps(run, command, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    assert_one_line(run(*command, "--heldout-text", command[4]), "held-out text overlaps")


def test_a_plan_file_that_exists_is_kept(run, command, tmp_path, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    (tmp_path / "plan.json").write_text("mine")
    assert_one_line(run(*command), "plan.json exists", "--force")
    assert (tmp_path / "plan.json").read_text() == "mine"
    with pytest.raises(ZeroDivisionError):
        run(*command, "--force")
    assert (tmp_path / "plan.json").read_text() == "mine"
