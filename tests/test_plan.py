"""Plans: validation, files, and the paper's."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from families import FAMILIES
from tidaldecode import PAPER_RESELECT_LAYERS, InputError, ModelShape, Source, TidalPlan
from tidaldecode.methods.method import Method
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models import check_plan
from tidaldecode.plans import shipped_plans
from tidaldecode.plans.find import find_plan

ROLES = ("full", "select", "sparse", "select", "sparse")
FIELDS = {"roles": ROLES, "selection": "unified", "token_budget": 64}


def test_is_frozen():
    plan = TidalPlan(**FIELDS)
    with pytest.raises(ValidationError):
        plan.token_budget = 3  # type: ignore[misc]


def test_survives_a_file(tmp_path):
    plan = TidalPlan(
        **FIELDS | {"token_budget": 0.25, "recent_tokens": 0.5, "sink_tokens": 4},
        name="a",
        model=ModelShape(name="m", num_layers=5, num_query_heads=4, num_kv_heads=2, head_dim=8),
        sources={4: ("1:unified", "3:per_head:2", "3:per_group:1", "1:per_head:0")},
        drafting="verification",
        budgets={1: 0.5},
    )
    plan.save(tmp_path / "plan.json")
    assert TidalPlan.load(tmp_path / "plan.json") == plan
    assert plan.sources[4][1] == Source(layer=3, selection="per_head", head=2)
    assert json.loads((tmp_path / "plan.json").read_text())["roles"] == list(ROLES)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    TidalPlan(**FIELDS).save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_text()
    monkeypatch.setattr(TidalPlan, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TidalPlan(**FIELDS | {"token_budget": 99}).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_budget": 0}, "token_budget: 0 must be positive"),
        ({"token_budget": -5}, "token_budget: -5 must be positive"),
        ({"token_budget": 1.5}, r"token_budget: 1.5 as a fraction of the context must lie in \(0, 1\]"),
        ({"token_budget": 0.0}, "token_budget: 0.0 as a fraction"),
        ({"token_budget": True}, "token_budget: Input should be a valid integer"),
        (
            {"token_budget": 9, "sink_tokens": 4, "recent_tokens": 5},
            r"9 is below sink_tokens \+ recent_tokens \+ 1 = 10",
        ),
        ({"recent_tokens": 0}, "recent_tokens: 0 must be at least 1"),
        ({"recent_tokens": 1.0}, "recent_tokens: 1.0 as a share"),
        ({"sink_tokens": -1}, "sink_tokens: "),
        ({"roles": ("full", "sparse", "select")}, "layer 1 is sparse but no layer below it is select"),
        ({"roles": ("full", "dense")}, "roles.1: "),
        ({"roles": ()}, "roles: "),
        ({"selection": "per_layer"}, "selection: "),
        ({"selection": None}, "selection: "),
        ({"page_size": 16}, "page_size: unknown key"),
        ({"drafting": "none"}, "drafting: Input should be 'plan' or 'verification'"),
        ({"budgets": {0: 300}}, "budgets: layer 0 is not a layer that chooses"),
        ({"budgets": {-2: 300}}, "budgets: layer -2 is not a layer that chooses"),
        ({"budgets": {9: 300}}, "budgets: layer 9 is not a layer that chooses"),
        ({"budgets": {1: 0.5}}, "budgets: 0.5 of layer 1 must be tokens or a fraction, as token_budget is"),
        ({"budgets": {1: 0}}, "budgets: layer 1: 0 must be positive"),
        ({"budgets": {1: 4}, "sink_tokens": 4}, r"budgets: layer 1: 4 is below sink_tokens \+ recent"),
        ({"sources": {3: ("1:unified",)}}, "layer 3 is not a layer that reads chosen tokens"),
        ({"sources": {9: ("1:unified",)}}, "layer 9 is not a layer that reads chosen tokens"),
        ({"sources": {2: ("3:unified",)}}, "layer 2 reads layer 3, which is no select layer below it"),
        ({"sources": {4: ("nearest",)}}, "'nearest' is no source"),
        (
            {"model": {"num_layers": 6, "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8}},
            "5 roles for a model of 6 layers",
        ),
        (
            {"model": {"num_layers": 5, "num_query_heads": 4, "num_kv_heads": 3, "head_dim": 8}},
            "4 query heads are no multiple of 3 KV heads",
        ),
    ],
)
def test_names_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(FIELDS | change))
    with pytest.raises(InputError, match=message) as error:
        TidalPlan.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_sources_must_fit_the_heads():
    shape = ModelShape(num_layers=5, num_query_heads=4, num_kv_heads=2, head_dim=8)
    with pytest.raises(InputError, match="names 1 sets for 4 query heads"):
        TidalPlan.validated(**FIELDS, model=shape, sources={2: ("1:unified",)})
    with pytest.raises(InputError, match="reads head 2, which the model does not have"):
        TidalPlan.validated(**FIELDS, model=shape, sources={2: ("1:per_group:2",) * 4})


@pytest.mark.parametrize("text", ["", "[1", '"plan"', "null"])
def test_refuses_what_is_no_plan(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        TidalPlan.load(tmp_path / "plan.json")
    with pytest.raises(InputError, match="does not exist"):
        TidalPlan.load(tmp_path / "other.json")


def test_budget_at_a_context():
    plan = TidalPlan(**FIELDS | {"token_budget": 0.1, "sink_tokens": 4, "recent_tokens": 0.25})
    assert plan.budget_for(10_000) == 1000
    assert plan.recent_for(1000) == 250
    assert plan.budget_for(20) == 4 + 1 + 1  # never too small for sinks, recent tokens and one more
    assert plan.with_budget(64).budget_for(10_000) == 64
    with pytest.raises(InputError, match="5 is below"):
        plan.with_budget(5)


def test_budgets_of_layers_go_along_with_another_budget():
    plan = TidalPlan(**FIELDS | {"token_budget": 256}, budgets={1: 1024, 3: 100}).with_budget(512)
    assert [plan.budget_for(10_000, layer) for layer in (None, 1, 3)] == [512, 2048, 200]
    plan = plan.with_budget(0.25)
    assert [plan.budget_for(1000, layer) for layer in (None, 1, 3)] == [250, 1000, 98]
    plan = TidalPlan(**FIELDS, budgets={3: 8}, sink_tokens=4, recent_tokens=0.25).with_budget(32)
    assert plan.budget_for(10_000, 3) == 6  # with room for a chosen one beside sinks and recent tokens
    fraction = TidalPlan(**FIELDS | {"token_budget": 0.25}, budgets={1: 0.03})
    method = Method.named("tidal", None, fraction)
    shape = ModelShape(num_layers=5, num_query_heads=4, num_kv_heads=2, head_dim=8)
    for context in (150, 1001):
        assert method.attention(shape, context).plan.budget_for(context, 1) == fraction.budget_for(context, 1)


def test_another_way_to_draft():
    plan = TidalPlan(**FIELDS)
    assert plan.drafting == "plan"
    assert plan.with_drafting("verification") == TidalPlan(**FIELDS, drafting="verification")
    with pytest.raises(InputError, match="drafting: Input should be"):
        plan.with_drafting("both")


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("recent", [1, 7, 0.25, 0.9])
@pytest.mark.parametrize("sink", [0, 4, 16])
def test_a_budget_always_holds_sinks_recent_tokens_and_one_more(fraction, recent, sink):
    plan = TidalPlan(**FIELDS | {"token_budget": fraction, "sink_tokens": sink, "recent_tokens": recent})
    for context in range(1, 500):
        budget = plan.budget_for(context)
        assert sink + plan.recent_for(budget) + 1 <= budget
        assert budget >= fraction * context


def test_the_papers_plan():
    plan = TidalPlan.paper(32, PAPER_RESELECT_LAYERS["llama-3-8b"])
    assert [layer for layer, role in enumerate(plan.roles) if role == "full"] == [0, 1]
    assert [layer for layer, role in enumerate(plan.roles) if role == "select"] == [2, 13]
    assert (plan.selection, plan.sink_tokens, plan.recent_tokens) == ("per_head", 0, 1)
    assert TidalPlan.paper(32, 7).roles[7] == "select"
    assert TidalPlan.paper(12, 11, global_layers=(2, 5, 8, 11)).roles[2::3] == ("full", "full", "select", "select")
    assert TidalPlan.paper(12, global_layers=(2, 5, 8, 11)).roles[0] is None
    with pytest.raises(InputError, match="needs 3 layers"):
        TidalPlan.paper(2)
    with pytest.raises(InputError, match="reselect_layer 1 must be one of the layers 2 to 31"):
        TidalPlan.paper(32, 1)


def test_sets_that_a_kv_head_reads():
    """As many as its query heads name; what the decode attention counts as read, too."""
    shape = ModelShape(num_layers=7, num_query_heads=6, num_kv_heads=2, head_dim=16)
    plan = TidalPlan.paper(7, 4, token_budget=16)
    assert plan.sets_per_kv_head(shape) == 3
    for selection in ("per_group", "unified"):
        assert plan.model_copy(update={"selection": selection}).sets_per_kv_head(shape) == 1
    assert TidalPlan.full(7).sets_per_kv_head(shape) == 0
    heads = [f"2:per_head:{head}" for head in (0, 0, 1, 2, 2, 2)]  # two sets, and one
    named = TidalPlan(**plan.model_dump() | {"sources": {3: heads}})
    assert named.sets_per_kv_head(shape) == (1.5 + 3 + 3) / 3
    reads = DecodeAttention(named, shape).tokens_read(1000)
    assert [reads[layer] / 16 for layer in (3, 5, 6)] == [1.5, 3, 3]


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("llama", "paper", "plan paper on brand-new-1b: its re-selection layer, 3, is a default"),
        ("llama", TidalPlan.paper(7), "its re-selection layer, 3, is a default"),
        ("llama", TidalPlan.paper(7).with_budget(64), "its re-selection layer, 3, is a default"),
        ("llama", TidalPlan.paper(7, 5), None),  # somebody chose it
        ("gemma3_text", TidalPlan.paper(10, global_layers=(1, 2, 4)), "no layer is sparse, so every layer reads all"),
        ("llama", "full", None),
    ],
)
def test_plans_that_can_hardly_be_what_was_wanted(caplog, family, plan, words):
    windows = {"layer_types": ["full_attention" if layer in (1, 2, 4) else "sliding_attention" for layer in range(10)]}
    config = FAMILIES[family](name_or_path="brand-new-1b", **(windows if family == "gemma3_text" else {}))
    for _ in range(2):
        check_plan(find_plan(plan, config) if isinstance(plan, str) else plan, config)
    assert caplog.text.count("WARNING") == (words is not None)
    assert words is None or words in caplog.text


def test_the_papers_plan_where_its_layer_was_published(caplog):
    config = FAMILIES["llama"](num_hidden_layers=32, name_or_path="meta-llama/Llama-3.1-8B-Instruct")
    plan = find_plan("paper", config)
    check_plan(plan, config)
    assert plan.roles[13] == "select" and caplog.text == ""


def test_shipped_plans_are_valid_and_named_after_their_files():
    plans = shipped_plans()
    assert {"smollm2-135m", "smollm2-135m-paper"} <= set(plans)
    assert all(plan.name == name for name, plan in plans.items())
