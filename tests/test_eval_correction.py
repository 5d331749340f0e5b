"""`tidaldecode eval correction`: the study of the tokens between two passes with full attention."""

from __future__ import annotations

import json

import pytest
import torch

from command_line import assert_one_line
from families import FAMILIES, plan_for
from tidaldecode import apply
from tidaldecode.evaluate.correction import tokens_of_warm_up


@pytest.fixture
def study(run, tiny_folder, tmp_path):
    plan_for(FAMILIES["llama"]()).save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 8)

    def call(*more):
        options = ["--model", str(tiny_folder), "--plan", str(tmp_path / "plan.json"), "--context", "90"]
        options += ["--text", str(tmp_path / "text.txt"), "--decode", "12", "--windows", "2", "--stride", "97"]
        return run("eval", "correction", *options, "--lengths", "3,5", "--budget", "8,1.0", "--json", *more)

    return call


def test_rows_and_resumption(study, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, err = study("--output", str(tmp_path / "results"))
    report = json.loads(out)
    assert status == 0
    rows = {(row["mode"], row["length"], row["budget"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 1 + 2 * (1 + 2 + 2)
    for (mode, length, budget), row in rows.items():
        assert row["windows"] == 2
        assert row["ms_per_token"] > 0
        if budget == 1.0 or mode in ("full", "lossless"):
            assert row["gap"] == pytest.approx(0, abs=1e-5)
        else:
            assert abs(row["gap"]) > 1e-3
        read = row["kv_read_fraction"]
        if length is None:
            assert read == 1 if mode == "full" or budget == 1.0 else 0 < read < 1
        else:  # passes with full attention are counted
            extra = read - rows["plain", None, budget]["kv_read_fraction"]
            assert extra > 0.1 if mode == "correction" else extra > -1e-6
        if mode == "lossless":
            assert row["differing"] == 0
            assert 1 <= row["accepted_per_round"] <= length + 1
    assert rows["lossless", 3, 1.0]["accepted_per_round"] == pytest.approx(
        11 / 3, abs=1e-4
    )  # 12 tokens, the first one apart
    assert "correction" in err and "lossless" in err
    file = tmp_path / "results" / "correction.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-4]) + "\n")
    again = json.loads(study("--output", str(tmp_path / "results"))[1])
    assert [row["gap"] for row in again["rows"]] == [row["gap"] for row in report["rows"]]
    assert len(file.read_text().splitlines()) == len(lines)
    assert (tmp_path / "results" / "correction.png").stat().st_size > 10_000


def test_bad_options(study, run, tmp_path):
    assert_one_line(study("--lengths", "0"), "--lengths 0 must be positive")
    assert_one_line(study("--budget", "many"), "--budget 'many' is no number")
    assert_one_line(study("--context", "9000"), "beyond the model's 512 positions")
    FAMILIES["gemma3_text"](architectures=["Gemma3ForCausalLM"]).save_pretrained(tmp_path / "gemma")
    (tmp_path / "gemma" / "model.safetensors").write_bytes(b"")
    result = run("eval", "correction", "--model", str(tmp_path / "gemma"), "--text", str(tmp_path / "text.txt"),
                 "--context", "90", "--decode", "12")  # fmt: skip
    assert_one_line(result, "sliding-window layers, which can't forget: leave out --model")


def test_the_warm_up_drafts_all_that_a_round_can(tiny):
    """Out of verification, too, where the first round drafts none."""
    for drafting in ("plan", "verification"):
        model = tiny("llama")
        plan = plan_for(model.config, token_budget=400).with_drafting(drafting)
        apply(model, plan)
        prompt = torch.arange(2, 42)[None]
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens_of_warm_up(4),
            lossless=4,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        assert 4 in output.past_key_values.rounds.drafted
