"""`bench generate`: whole calls of generate; what is run and counted, never how fast it was."""

from __future__ import annotations

import json

import pytest
import torch

from command_line import assert_one_line
from families import FAMILIES, plan_for
from tidaldecode import TidalCache, TidalPlan, apply
from tidaldecode.bench import whole_run
from tidaldecode.bench.settings import WholeRunSettings
from tidaldecode.bench.whole_run import Way, whole_runs
from tidaldecode.errors import InputError, MemoryShortError
from tidaldecode.evaluate.study import measure
from tidaldecode.hf import applied_plan
from tidaldecode.methods.method import Method
from tidaldecode.report.page import write_report
from tidaldecode.results.whole_runs import whole_run_rows
from tidaldecode.texts.text import Text

TEXT = Text(torch.randint(2, 250, (90,), generator=torch.Generator().manual_seed(2), dtype=torch.int32))
SETTINGS = WholeRunSettings(contexts=(40,), batches=(1, 3), new_tokens=12, methods=("full",))


@pytest.fixture
def command(run, tiny_folder, tmp_path):
    plan_for(FAMILIES["llama"]()).save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 3)

    def call(*more):
        options = ["--model", str(tiny_folder), "--plan", str(tmp_path / "plan.json"), "--budgets", "16"]
        options += ["--text", str(tmp_path / "text.txt"), "--contexts", "40", "--new-tokens", "12", "--json"]
        return run("bench", "generate", *options, *more)

    return call


def test_rows_and_resumption(command, tmp_path, monkeypatch):
    methods = "full,tidal,lossless,streaming,transformers"
    options = ["--batches", "1,2", "--methods", methods, "--lossless", "auto,3", "--output", str(tmp_path / "results")]
    status, out, err = command(*options)
    assert status == 0
    report = json.loads(out)
    ways = [("full", None), ("tidal", None), ("lossless", "auto"), ("lossless", 3), ("streaming", None),
            ("transformers", None)]  # fmt: skip
    assert [(r["method"], r["lossless"], r["batch"]) for r in report["rows"]] == [
        (*way, batch) for batch in (1, 2) for way in ways
    ]
    for row in report["rows"]:
        base = [other for other in report["rows"] if other["method"] in ("full", "transformers")]
        base = [other for other in base if other["batch"] == row["batch"]]
        fastest = min(other["total_ms"] for other in base)
        assert row["speedup_vs_full"] == pytest.approx(fastest / row["total_ms"], abs=1e-3)
        assert row["total_ms"] == pytest.approx(row["prefill_ms"] + 11 * row["decode_ms_per_token"], abs=0.1)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 1000 / row["decode_ms_per_token"], rel=1e-2)
        assert (row["kv_read_fraction"] == 1) == (row["method"] in ("full", "transformers"))
        assert (row["accepted_per_round"] is not None) == (row["lossless"] == 3) or row["lossless"] == "auto"
        assert row["peak_memory_gib"] is None and not row["out_of_memory"]
    assert report["rows"][1]["plan"] == "plan" and report["rows"][1]["budget"] == 16
    assert "batch 2, 40 tokens, 12 new" in err and "auto" in err
    monkeypatch.setattr(whole_run, "_measure", lambda *arguments: 1 / 0)
    assert json.loads(command(*options)[1])["rows"] == report["rows"]
    pytest.importorskip("matplotlib")
    page = write_report(tmp_path / "results", tmp_path / "report.html")
    assert page.skipped == []
    text = page.output.read_text()
    assert "Whole calls of generate" in text and "lossless, plan, T = auto" in text


def test_every_way_generates_what_it_should(tiny, monkeypatch):
    """Full attention's text by Transformers and losslessly; the plan's by the plan; from another window each."""
    model, texts = apply(tiny("llama"), "full"), {}
    plan = plan_for(model.config, token_budget=6)
    original = whole_run._generate

    def keeping(model, prompts, new_tokens, **options):
        generate = model.generate
        with monkeypatch.context() as patch:
            patch.setattr(model, "generate", lambda *a, **k: texts.setdefault(len(texts), generate(*a, **k)))
            return original(model, prompts, new_tokens, **options)

    monkeypatch.setattr(whole_run, "_generate", keeping)
    tidal = Method.named("tidal", plan=plan.model_copy(update={"name": "p"}))
    full = Method.named("full")
    ways = [Way("full", full), Way("lossless", tidal, "auto"), Way("transformers", full),
            Way("transformers-static", full), Way("tidal", tidal)]  # fmt: skip
    measure(whole_runs(TEXT, WholeRunSettings(contexts=(40,), batches=(3,), new_tokens=12), ways), model)
    assert [len(text[0]) for text in texts.values()] == [48, 52, 52, 52, 48, 52, 52, 52, 48, 52]  # warmed up first
    expected, *same, other = [text for number, text in texts.items() if number % 2]
    assert torch.equal(expected[:, :40], TEXT.spread(40, 3))
    assert all(torch.equal(text, expected) for text in same)
    assert not torch.equal(other, expected)
    assert applied_plan(model).name == TidalPlan.full(7).name and "_previous_max_cache_length" not in vars(model)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryShortError])
def test_memory_that_is_short_is_a_row(tiny, monkeypatch, error):
    fill, model = TidalCache.__init__, apply(tiny("llama"), "full")

    def too_long(cache, config, plan, capacity):
        fill(cache, config, plan, capacity)
        if capacity == 52 and len(tried) == 1:
            raise error("short")
        tried.append(capacity)

    tried = [0]
    monkeypatch.setattr(TidalCache, "__init__", too_long)
    first, second = measure(whole_runs(TEXT, SETTINGS, [Way("full", Method.named("full"))]), model)
    assert first.out_of_memory and first.total_ms is None and first.speedup_vs_full is None
    monkeypatch.undo()
    assert second.out_of_memory


def test_full_attention_is_the_fastest_there_is():
    row = {"context": 8, "batch": 1, "method": "full", "total_ms": 8.0, "decode_ms_per_token": 2.0}
    rows = [row, row | {"method": "transformers", "total_ms": 6.0, "decode_ms_per_token": 3.0},
            row | {"method": "tidal", "total_ms": 3.0, "decode_ms_per_token": 1.0},
            row | {"method": "tidal", "batch": 2},
            row | {"method": "transformers-static", "total_ms": None, "decode_ms_per_token": None}]  # fmt: skip
    found = whole_run_rows(rows)
    assert [found_row.speedup_vs_full for found_row in found] == [0.75, 1, 2, None, None]
    assert [found_row.decode_speedup_vs_full for found_row in found] == [1, 0.6667, 2, None, None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "magic"], ["--methods 'magic' is unknown", "transformers-static"]),
        (["--methods", "full"], ["--methods full reads everything: leave out --budgets"]),
        (["--lossless", "0"], ["--lossless 0 must be positive"]),
        (["--lossless", "often"], ["--lossless 'often'"]),
        (["--contexts", "505"], ["--contexts 505 and --new-tokens 12 are 517 tokens, the model has 512 positions"]),
        (["--contexts", "300"], ["the text has 192 tokens, 108 too few for a context of 300"]),
        (["--new-tokens", "1"], ["--new-tokens"]),
        (["--text", "nowhere.txt"], ["text file nowhere.txt does not exist"]),
        (["--plan", "nowhere.json"], ["nowhere.json"]),
    ],
)
def test_bad_input(command, monkeypatch, options, words):
    """Told before the model is loaded."""
    monkeypatch.setattr("tidaldecode.models.files.ModelFiles.model", lambda *arguments: 1 / 0)
    assert_one_line(command(*options), *words)


def test_budgets_that_methods_need():
    with pytest.raises(InputError, match="--methods quest needs --budgets"):
        WholeRunSettings(methods=("quest",))
    assert WholeRunSettings().methods_on("cuda")[-1] == "transformers-static"
    assert WholeRunSettings().methods_on("cpu") == ("full", "tidal", "lossless", "transformers")
    assert WholeRunSettings(methods=("full", "transformers")).plans == ()
