"""`coherence`: recall between layers against plain dense attention, what it must be in plain cases, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from command_line import assert_one_line
from families import LAYERS
from tidaldecode import InputError, TidalCache, apply
from tidaldecode.calibrate import attention_weights
from tidaldecode.calibrate.attention_weights import AttentionWithWeights, ChosenSets, LayerWeights
from tidaldecode.calibrate.coherence import Coherence, coherence, measure_recall
from tidaldecode.calibrate.settings import CoherenceSettings
from tidaldecode.calibrate.stretches import Stretch
from tidaldecode.evaluate import scoring
from tidaldecode.evaluate.scoring import step_logits
from tidaldecode.models import model_shape
from tidaldecode.plans.find import find_plan
from tidaldecode.report.folder import read_results
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import Windows

RULES = ("unified", "per_group", "per_head")
PROMPT, STEPS, BUDGET = 45, 11, 8
IDS = torch.randint(2, 260, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
WINDOW = torch.cat([IDS, IDS[:, :1]], 1)  # the last token is only predicted


@pytest.fixture
def double(tiny):
    """Makes a tiny model in float64, where no two scores at the border of a budget lie within rounding."""

    def make(family="llama", **overrides):
        model = tiny(family, **overrides).double()
        if hasattr(model.config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # the grouped one has no float64
        return model

    return make


def read(model, capacity=PROMPT + STEPS):
    """A cache that holds the prompt."""
    cache = TidalCache(model.config, find_plan("full", model.config), capacity)
    model(IDS[:, :PROMPT].to(model.device), past_key_values=cache, logits_to_keep=1)
    return cache


def measure(model, budget=BUDGET, sink_tokens=0, rules=RULES):
    """Recall on the steps behind the prompt."""
    apply(model, "full")
    return measure_recall(Stretch.read(model, WINDOW, STEPS), ChosenSets(rules, budget, sink_tokens))


def dense_recall(model, rule, budget=BUDGET, sink_tokens=0):
    """By the formula, from the attention weights that Transformers gives."""
    model.set_attn_implementation("eager")
    weights = model(IDS, use_cache=False, output_attentions=True).attentions  # of each layer [1, Hq, T, T]
    shape = model_shape(model.config)
    size = shape.num_query_heads // shape.num_sets(rule)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * shape.num_layers
    layers = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    recall = torch.full((shape.num_layers, shape.num_layers, shape.num_sets(rule)), torch.nan).double()
    recall[[i for i in layers for j in layers if i <= j], [j for i in layers for j in layers if i <= j]] = 0
    for step in range(PROMPT, PROMPT + STEPS):
        means = {i: [p.mean(0) for p in weights[i][0, :, step, : step + 1].split(size)] for i in layers}
        forced = [*range(sink_tokens), step]
        for s in range(shape.num_sets(rule)):
            chosen = {}
            for i in layers:
                others = [token for token in means[i][s].argsort(descending=True).tolist() if token not in forced]
                chosen[i] = forced + others[: budget - len(forced)]
            for i, j in ((i, j) for i in layers for j in layers if i <= j):
                recall[i, j, s] += means[j][s][chosen[i]].sum() / means[j][s][chosen[j]].sum() / STEPS
    return recall


@pytest.mark.parametrize(
    ("family", "sink_tokens"),
    [("llama", 0), ("llama", 3), ("gpt_neox", 0), ("mistral", 0), ("gemma3_text", 3), ("qwen3_moe", 0)],
)
def test_recall_equals_the_formula_on_dense_attention(double, family, sink_tokens):
    found = measure(double(family), sink_tokens=sink_tokens)
    for rule in RULES:
        expected = dense_recall(double(family), rule, sink_tokens=sink_tokens)
        torch.testing.assert_close(found[rule], expected, rtol=0, atol=1e-5, equal_nan=True)
        assert 0.1 < expected.nanmean() < 0.99  # layers do differ


def test_a_layer_covers_its_own_choice_and_none_below_it(double):
    for recall in measure(double()).values():
        assert (recall.diagonal() == 1).all()
        below = torch.ones(LAYERS, LAYERS).tril(-1).bool()
        assert recall[below].isnan().all()
        assert ((recall[~below] > 0) & (recall[~below] <= 1)).all()
        assert (recall[below.T] < 1).any()


@pytest.mark.parametrize("budget", [PROMPT + STEPS, 400])
def test_a_budget_of_the_context_covers_everything(double, budget):
    for recall in measure(double(), budget).values():
        assert (recall[torch.ones(LAYERS, LAYERS).triu().bool()] - 1).abs().max() < 1e-12


def test_layers_that_attend_alike_cover_each_other(double):
    """All layers have the first one's weights, and add nothing to what the next one sees."""
    model = double()
    first = model.model.layers[0]
    first.self_attn.o_proj.weight.data.zero_()
    first.mlp.down_proj.weight.data.zero_()
    for layer in model.model.layers[1:]:
        layer.load_state_dict(first.state_dict())
    for recall in measure(model).values():
        assert (recall[torch.ones(LAYERS, LAYERS).triu().bool()] == 1).all()


@pytest.mark.parametrize("count", [4, 1])
@pytest.mark.parametrize("bound", ["scores", "sets"])
def test_how_many_steps_go_in_one_pass_does_not_matter(double, monkeypatch, bound, count):
    expected, passes = measure(double()), []
    begin = AttentionWithWeights.begin
    monkeypatch.setattr(AttentionWithWeights, "begin", lambda *args: passes.append(len(args[1])) or begin(*args))
    if bound == "scores":
        monkeypatch.setattr(scoring, "steps_at_once", lambda model, capacity: count)
    else:  # 9 sets of 8 tokens in each layer
        monkeypatch.setattr(attention_weights, "_MOST_BYTES", count * 4 * LAYERS * 9 * BUDGET)
    found = measure(double())
    assert passes == [count] * (STEPS // count) + [STEPS % count] * (STEPS % count > 0)
    for rule in RULES:
        torch.testing.assert_close(found[rule], expected[rule], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.gpu
def test_the_kernels_find_the_same(tiny):
    found, expected = measure(tiny().cuda()), measure(tiny())
    for rule in RULES:
        torch.testing.assert_close(found[rule], expected[rule], rtol=0, atol=1e-2, equal_nan=True)  # scores may tie


def test_rules_alone_are_those_together(double):
    together = measure(double())
    for rule in RULES:
        alone = measure(double(), rules=(rule,))
        assert list(alone) == [rule]
        assert torch.equal(alone[rule].nan_to_num(), together[rule].nan_to_num())


def test_what_is_shown(double):
    """Full attention's logits; each layer's probabilities, and the sets of it and all layers below, step by step."""
    model = apply(double("gemma3_text"), "full")
    (expected,) = step_logits(model, read(model), IDS[:, PROMPT:])
    seen = []

    def show(shown):
        assert list(shown.chosen) == [*seen, shown.layer]
        seen.append(shown.layer)
        lengths = torch.arange(PROMPT + 1, PROMPT + STEPS + 1)
        assert torch.equal(shown.weights.count_nonzero(-1), lengths[:, None].expand(-1, 4))
        torch.testing.assert_close(shown.weights.sum(-1), torch.ones(STEPS, 4).double())
        assert [shown.averaged(sets).shape[1] for sets in (1, 2, 4)] == [1, 2, 4]
        for rule, sets in shown.chosen[shown.layer].items():
            assert sets.shape == (STEPS, {"per_head": 4, "per_group": 2, "unified": 1}[rule], BUDGET)
            mass = shown.mass(shown.averaged(sets.shape[1]), sets)
            best = shown.averaged(sets.shape[1]).topk(BUDGET).values.sum(-1)
            assert (mass <= best + 1e-12).all() and (mass > best / 2).all()

    cache = read(model, capacity=PROMPT + STEPS + 7)
    cache.attention = AttentionWithWeights(model_shape(model.config), ChosenSets(RULES, BUDGET), show)
    (logits,) = step_logits(model, cache, IDS[:, PROMPT:])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert seen == [1, 2, 4, 5, 7, 8, 9]
    assert cache.attention.kv_read_fraction(50) == 1


def test_mass_is_of_the_valid_entries():
    weights = torch.tensor([[[0.1, 0.2, 0.3, 0.4]] * 2, [[0.5, 0.5, 0.0, 0.0]] * 2])
    shown = LayerWeights(0, weights, {}, counts=torch.tensor([3, 2], dtype=torch.int32))
    indices = torch.tensor([[[3, 1, 2], [0, 1, 2]], [[1, 0, 0], [0, 1, 1]]], dtype=torch.int32)
    torch.testing.assert_close(shown.mass(weights, indices), torch.tensor([[0.9, 0.6], [1.0, 1.0]]))
    each_by_each = shown.mass(weights[:, :, None], indices[:, None])  # [n, head, set]
    torch.testing.assert_close(each_by_each[0], torch.tensor([[0.9, 0.6], [0.9, 0.6]]))


# ---- a text


WINDOWS = Windows(context=PROMPT + STEPS + 1, decode=STEPS + 1, windows=3, offset=2, stride=20)
TEXT = Text(torch.randint(2, 260, (120,), generator=torch.Generator().manual_seed(3), dtype=torch.int32))


def test_windows_of_a_text(double):
    model = apply(double("gemma3_text"), "full")
    progress = []
    found = coherence(model, TEXT, CoherenceSettings(WINDOWS, RULES, BUDGET), lambda *what: progress.append(what))
    assert [done for done, _, _ in progress] == [0, 1, 2, 3] and {total for _, total, _ in progress} == {3}
    for window, start in enumerate((2, 22, 42)):
        tokens = TEXT.tokens[None, start : start + PROMPT + STEPS + 1].long()
        alone = measure_recall(Stretch.read(model, tokens, STEPS + 1), ChosenSets(RULES, BUDGET))
        for rule in RULES:
            torch.testing.assert_close(found.recalls[rule][window], alone[rule], rtol=0, atol=1e-12, equal_nan=True)
    matrix = found.matrices["per_head"]
    assert matrix[0] == [None] * 10 and [row[0] for row in matrix] == [None] * 10
    assert matrix[1][2] == pytest.approx(found.recalls["per_head"][:, 1, 2].mean().item(), abs=1e-6)
    assert found.distances["per_head"][9] is None


def test_means_over_distance():
    nan = torch.nan
    recall = torch.tensor([[1.0, 0.5, 0.25], [nan, 1.0, 0.75], [nan, nan, 1.0]]).double()[None, :, :, None]
    found = Coherence({"unified": torch.cat([recall, recall - 0.25])})
    assert found.matrices == {"unified": [[0.875, 0.375, 0.125], [None, 0.875, 0.625], [None, None, 0.875]]}
    assert found.distances == {"unified": [0.875, 0.5, 0.125]}


def test_wrong_settings(tiny):
    for arguments, message in (
        ({"budget": PROMPT}, "budget 45 leaves nothing to choose: the first decode step .* context of 45 tokens"),
        ({"budget": 1}, "budget 1 leaves nothing to choose: 0 sinks, the new token and a chosen one make 2"),
        ({"budget": 5, "sink_tokens": 4}, "4 sinks, the new token and a chosen one make 6"),
    ):
        with pytest.raises(InputError, match=message):
            CoherenceSettings(WINDOWS, RULES, **arguments)
    with pytest.raises(InputError, match="the text has 50 tokens, 49 too few"):
        coherence(apply(tiny(), "full"), Text(TEXT.tokens[:50]), CoherenceSettings(WINDOWS, RULES, BUDGET))


# ---- the command


@pytest.fixture
def command(tiny_folder, tmp_path):
    """A run that takes a second."""
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 20)
    return [
        "coherence", "--model", str(tiny_folder), "--text", str(tmp_path / "text.txt"), "--context", "96",
        "--decode", "20", "--windows", "2", "--stride", "200", "--budget", "16",
    ]  # fmt: skip


def test_the_command(run, command, tmp_path):
    output = tmp_path / "new" / "results"
    status, out, err = run(*command, "--output", str(output), "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert answer == json.loads((output / "coherence.json").read_text())
    assert {"command", "versions", "device", "model", "seed", "seconds"} <= answer.keys()
    assert (answer["text"], answer["context"], answer["windows"], answer["budget"]) == ("text.txt", 96, 2, 16)
    assert answer["selections"] == list(answer["recalls"]) == list(answer["distances"]) == list(RULES)
    assert answer["recall"] == answer["recalls"]["unified"] and answer["distance"] == answer["distances"]["unified"]
    for matrix in answer["recalls"].values():
        assert [len(row) for row in matrix] == [LAYERS] * LAYERS
        assert [matrix[i][i] for i in range(LAYERS)] == [1] * LAYERS
        assert all((matrix[i][j] is None) == (i > j) for i in range(LAYERS) for j in range(LAYERS))
    assert len(answer["distance"]) == LAYERS and answer["distance"][0] == 1 > answer["distance"][1] > 0
    figures = [answer["figure"], answer["distance_figure"]]
    assert [Path(figure).name for figure in figures] == ["coherence.png", "coherence_distance.png"]
    assert all(Path(figure).read_bytes()[:4] == b"\x89PNG" for figure in figures)
    (result,), skipped = read_results(output)
    assert (result.kind, skipped) == ("recall", [])


def test_one_rule_and_a_fraction(run, command):
    status, out, err = run(*command, "--selection", "per_head", "--budget", "0.25", "--sink-tokens", "4", "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert (answer["selections"], answer["budget"], answer["sink_tokens"]) == (["per_head"], 24, 4)
    assert answer["figure"] is None
    assert "per_head" in err and "unified" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--selection", "best"], ["--selection 'best' is unknown", "unified,per_group,per_head"]),
        (["--budget", "many"], ["--budget 'many' is no number"]),
        (["--budget", "76"], ["budget 76 leaves nothing to choose", "76 tokens"]),
        (["--budget", "2000"], ["budget 2000 leaves nothing to choose"]),
        (["--budget", "1.0"], ["budget 96 leaves nothing to choose"]),
        (["--sink-tokens", "15"], ["15 sinks"]),
        (["--text", "nowhere.txt"], ["nowhere.txt does not exist"]),
        (["--windows", "9"], ["the text has 880 tokens, 816 too few for 9 windows of 96 tokens"]),
        (["--context", "513"], ["a context of 513 tokens is beyond the model's 512 positions"]),
        (["--decode", "95"], ["95 decoded tokens leave no prompt"]),
        (["--model", "./nowhere"], ["./nowhere does not exist"]),
    ],
)
def test_bad_input_before_the_model_is_loaded(run, command, options, words, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    assert_one_line(run(*command, *options), *words)


def test_a_wrong_output_before_the_model_is_loaded(run, command, tmp_path, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    (tmp_path / "file").write_text("")
    assert_one_line(run(*command, "--output", str(tmp_path / "file")), "is a file: give a folder")
    assert_one_line(run(*command, "--output", str(tmp_path / "file" / "folder")), "can't be made a folder")
