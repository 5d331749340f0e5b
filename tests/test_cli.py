"""The command line: what it prints, and one line for each bad input before any model is loaded."""

from __future__ import annotations

import codecs
import copy
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from command_line import assert_one_line
from families import FAMILIES, plan_for
from tidaldecode import ModelShape, TidalPlan
from tidaldecode.cli.tables import print_sets
from tidaldecode.evaluate.study import sets_per_kv_head
from tidaldecode.methods.method import METHODS, every_method
from tidaldecode.models import ModelFiles, check_architecture
from tidaldecode.results.environment import environment


@pytest.fixture
def tiny(tiny_folder, tmp_path):
    """Arguments for a tiny model and a plan for it."""
    plan_for(FAMILIES["llama"]()).save(tmp_path / "tiny-plan.json")
    return "--model", str(tiny_folder), "--plan", str(tmp_path / "tiny-plan.json")


@pytest.fixture
def no_model(monkeypatch):
    """Loading weights fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ModelFiles, "model", refuse)


def test_answers_and_tables(run, tiny):
    status, out, err = run("generate", "Call me Ishmael. " * 3, *tiny, "--max-new-tokens", "6")
    assert status == 0
    assert out.strip("\n")
    assert "context, tokens" in err
    assert "51" in err
    assert "tokens read per new token in each of 4 sparse layers" in err


def test_json_is_all_of_stdout(run, tiny, tmp_path):
    (tmp_path / "document.txt").write_text("Some years ago, never mind how long precisely. " * 2)
    options = ("--prompt-file", str(tmp_path / "document.txt"), "--question", "How long?", "--max-new-tokens", "9")
    status, out, err = run("generate", *options, *tiny, "--compare", "--json", "--seed", "3")
    answer = json.loads(out)
    assert status == 0
    assert {"model", "method", "token_budget", "context_tokens", "new_tokens", "text", "token_ids"} <= answer.keys()
    assert answer["method"] == "tidal"
    assert answer["token_budget"] == 16
    assert answer["context_tokens"] == 94 - 1 + len("\n\nQuestion: How long?\nAnswer:")
    assert answer["new_tokens"] == len(answer["token_ids"])
    lengths = range(123, 123 + answer["new_tokens"] - 1)  # 3 of 7 layers read all, 4 read 16 tokens
    assert answer["kv_read_fraction"] == pytest.approx(
        sum((3 * n + 4 * 16) / (7 * n) for n in lengths) / len(lengths), abs=1e-5
    )
    assert answer["decode_ms_per_token"] > 0
    assert answer["full"]["kv_read_fraction"] == 1
    assert answer["step_over_full"] > 0
    assert {"command", "versions", "device", "dtype"} <= answer.keys()
    assert "context, tokens" in err


def test_a_budget_is_that_of_one_set(run, tiny, tmp_path):
    """Three query heads of a KV head that choose for themselves read three sets; the table and the object say so."""
    plan_for(FAMILIES["llama"](), "per_head").save(tmp_path / "per-head.json")
    options = ("generate", "Call me Ishmael. " * 9, *tiny[:2], "--json", "--max-new-tokens", "4")
    _, out, err = run(*options, "--plan", str(tmp_path / "per-head.json"))
    answer = json.loads(out)
    assert "in each of 4 sparse layers" in err and "per KV head: 3 sets of 16 tokens" in err
    assert (answer["token_budget"], answer["sets_per_kv_head"], answer["tokens_read_per_kv_head"]) == (16, 3, 48)
    _, out, err = run(*options, *tiny[2:])
    answer = json.loads(out)
    assert "sets" not in err
    assert (answer["token_budget"], answer["sets_per_kv_head"], answer["tokens_read_per_kv_head"]) == (16, 1, 16)


def test_budgets_of_several_sets_are_explained_below_tables():
    """Of plans and of the oracle where query heads choose for themselves; of nobody else."""
    shape = ModelShape(num_layers=7, num_query_heads=6, num_kv_heads=2, head_dim=16)
    plans = [TidalPlan.paper(7), TidalPlan.paper(7).model_copy(update={"name": "one", "selection": "unified"})]
    methods = every_method(METHODS, (64,), plan=plans, selection=("per_head", "unified"))
    sets = sets_per_kv_head(methods, shape)
    assert sets == {"tidal, paper": 3, "oracle, per head": 3}
    console = Console(file=io.StringIO())
    print_sets(console, sets)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == (
        "tidal, paper: a budget is that of one set; each KV head reads 3 sets, so 3 times as many tokens"
    )
    assert len(lines) == 2


def test_the_papers_plan_where_it_was_not_tuned(run, tiny, byte_tokenizer, tmp_path, caplog):
    """Told once, however often a command checks it; and a plan without a sparse layer says so."""
    options = ("--plan", "paper", "--max-new-tokens", "2")
    run("generate", "Call me", *tiny[:2], *options)
    assert caplog.text.count("its re-selection layer, 3, is a default that was not tuned for this model") == 1
    assert caplog.text.count("`tidaldecode calibrate` finds a plan") == 1
    AutoModelForCausalLM.from_config(FAMILIES["llama"](num_hidden_layers=3)).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    run("generate", "Call me", "--model", str(tmp_path), *options)
    assert caplog.text.count("no layer is sparse, so every layer reads all tokens") == 1


def test_compare_finds_the_first_difference(run, tiny):
    answers = {
        budget: json.loads(
            run(
                "generate",
                "Call me Ishmael. " * 4,
                *tiny,
                "--budget",
                budget,
                "--compare",
                "--json",
                "--max-new-tokens",
                "24",
            )[1]
        )
        for budget in ("2", "500", "1.0")
    }
    for budget in ("500", "1.0"):
        assert answers[budget]["first_difference"] is None
        assert answers[budget]["token_ids"] == answers[budget]["full"]["token_ids"]
    few = answers["2"]
    assert few["full"] | {"decode_ms_per_token": 0} == answers["500"]["full"] | {"decode_ms_per_token": 0}
    place = few["first_difference"]
    assert few["token_ids"][:place] == few["full"]["token_ids"][:place]
    assert few["token_ids"][place] != few["full"]["token_ids"][place]
    alone = json.loads(
        run("generate", "Call me Ishmael. " * 4, *tiny[:2], "--method", "full", "--json", "--max-new-tokens", "24")[1]
    )
    assert alone["token_ids"] == few["full"]["token_ids"]
    assert (alone["method"], alone["kv_read_fraction"]) == ("full", 1)


def test_compare_with_layers_that_keep_a_window(run, byte_tokenizer, tmp_path):
    """Their cache can't be cropped, so the prompt is read twice."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = FAMILIES["gemma3_text"]()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    byte_tokenizer.save_pretrained(tmp_path / "gemma")
    plan_for(config, token_budget=1.0).save(tmp_path / "plan.json")
    options = ("--model", str(tmp_path / "gemma"), "--plan", str(tmp_path / "plan.json"), "--max-new-tokens", "8")
    answer = json.loads(run("generate", "Call me Ishmael. " * 4, *options, "--compare", "--json")[1])
    assert answer["first_difference"] is None
    assert answer["full"]["token_ids"] == answer["token_ids"]


def test_lossless(run, tiny):
    options = ("generate", "Call me Ishmael. " * 4, *tiny, "--json", "--max-new-tokens", "24")
    for length in ("3", "auto"):
        status, out, err = run(*options, "--compare", "--lossless", length, "--budget", "40")
        answer = json.loads(out)
        assert status == 0
        assert answer["first_difference"] is None
        assert answer["token_ids"] == answer["full"]["token_ids"]
        assert answer["lossless"] == (int(length) if length != "auto" else "auto")
        assert 1 <= answer["accepted_per_round"] <= 17
        assert answer["decode_ms_per_token"] > 0
        assert "tokens out per round" in err
    everything = json.loads(run(*options, "--lossless", "3", "--budget", "1.0")[1])
    assert everything["accepted_per_round"] == pytest.approx(23 / 6, abs=1e-4)  # six rounds, the last one cut
    reads = 5 * 4 + 3  # drafts and verification all read everything
    assert everything["kv_read_fraction"] == pytest.approx(reads / 23, abs=1e-5)


def test_correction(run, tiny):
    options = ("generate", "Call me Ishmael. " * 4, *tiny, "--json", "--max-new-tokens", "11")
    answers = [json.loads(run(*options, *more)[1]) for more in ([], ["--correction-interval", "4"])]
    plain, corrected = (answer["kv_read_fraction"] for answer in answers)
    assert corrected == pytest.approx(plain + 2 / 10, abs=1e-5)
    assert answers[1]["correction_interval"] == 4
    assert "accepted_per_round" not in answers[1]


def test_models_whose_tokens_cannot_run_again(run, byte_tokenizer, tmp_path, no_model):
    FAMILIES["gemma3_text"](architectures=["Gemma3ForCausalLM"]).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for option in ("--lossless", "--correction-interval"):
        result = run("generate", "Call me Ishmael.", "--model", str(tmp_path), "--plan", "paper", option, "4")
        assert_one_line(result, f"sliding-window layers, which can't forget: leave out {option}")


def test_sampling_follows_the_seed(run, tiny):
    def sample(seed):
        return run("generate", "Call me Ishmael.", *tiny, "--temperature", "1.5", "--top-p", "0.95", "--seed", seed)[1]

    assert sample("1") == sample("1")
    assert sample("1") != sample("2")


def test_standard_input(run, tiny):
    for options in ([], ["--prompt-file", "-"]):
        assert run("generate", *options, *tiny, "--max-new-tokens", "2", stdin=b"Call me Ishmael.")[0] == 0


def test_a_byte_order_mark_is_no_part_of_a_text(run, tiny, tmp_path):
    """Of a prompt file, of standard input, of an argument, of a plan."""
    (tmp_path / "marked.txt").write_bytes(codecs.BOM_UTF8 + b"Call me Ishmael.")
    (tmp_path / "marked.json").write_bytes(codecs.BOM_UTF8 + Path(tiny[3]).read_bytes())
    options = (*tiny[:2], "--plan", str(tmp_path / "marked.json"), "--max-new-tokens", "2", "--json")
    answers = [
        run("generate", "\ufeffCall me Ishmael.", *options),
        run("generate", "--prompt-file", str(tmp_path / "marked.txt"), *options),
        run("generate", *options, stdin=codecs.BOM_UTF8 + b"Call me Ishmael."),
    ]
    assert [json.loads(out)["context_tokens"] for _, out, _ in answers] == [16] * 3
    asked = run("generate", "Call me Ishmael.", "--question", "\ufeffWhy?", *options)
    assert json.loads(asked[1])["context_tokens"] == len("Call me Ishmael.\n\nQuestion: Why?\nAnswer:")


def test_a_question_to_a_model_without_a_chat_template(run, tiny):
    """It goes on with a text, so it gets one that an answer follows, and the user is told."""
    _, out, err = run("generate", "Call me Ishmael.", "--question", "Who?", *tiny, "--json", "--max-new-tokens", "2")
    assert json.loads(out)["context_tokens"] == len("Call me Ishmael.\n\nQuestion: Who?\nAnswer:")
    assert "the model has no chat template" in err
    assert "chat template" not in run("generate", "Call me Ishmael.", *tiny, "--max-new-tokens", "2")[2]


def test_standard_input_that_is_closed(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for options in ([], ["--prompt-file", "-"]):
        assert_one_line(run("generate", *options), "standard input is closed: give PROMPT or --prompt-file FILE")


def test_standard_output_that_is_full(run, tiny, monkeypatch, capsys):
    """In the middle of an answer; and where nobody reads on, there is nothing to say."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        result = run("generate", "Call me Ishmael.", *tiny, "--max-new-tokens", "4")
    assert_one_line(result, "standard output can't be written: No space left on device")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        status, _, err = run("generate", "Call me Ishmael.", *tiny, "--max-new-tokens", "4")
    assert (status, err) == (1, "")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "0"], ["--budget 0 must be positive"]),
        (["--budget", "-3"], ["--budget -3 must be positive"]),
        (["--budget", "many"], ["--budget 'many' is no number"]),
        (["--budget", "5"], ["token_budget: 5 is below sink_tokens + recent_tokens + 1 = 6"]),
        (["--plan", "nonsense"], ["no plan 'nonsense'", "smollm2-135m"]),
        (["--plan", "missing.json"], ["plan file missing.json does not exist"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--top-p", "0.5"], ["--top-p", "--temperature"]),
        (["--method", "magic"], ["magic"]),
        (["--method", "full", "--compare"], ["--compare"]),
        (["--temperature", "1", "--compare"], ["--compare"]),
        (["--nonsense"], ["--nonsense"]),
        (["--device", "abacus"], ["--device 'abacus' is unknown"]),
        (["--device", "cuda:7"], ["--device cuda:7: PyTorch sees"]),
        (["--model", "./nowhere"], ["model folder ./nowhere does not exist"]),
        (["--prompt-file", "x.txt"], ["either PROMPT or --prompt-file"]),
        (["--method", "full", "--budget", "64"], ["--method full", "--budget"]),
        (["--temperature", "1e-320"], ["--temperature 1e-320 is too small"]),
        (["--seed", "99999999999999999999"], ["--seed"]),
        (["--device", "meta"], ["--device 'meta' is not supported"]),
        (["--question", "\udcff?"], ["--question is not UTF-8"]),
        (["--lossless", "0"], ["--lossless '0': give the tokens to draft in a round, at least 1, or auto"]),
        (["--lossless", "often"], ["--lossless 'often'"]),
        (["--correction-interval", "0"], ["--correction-interval 0 must be at least 1 token"]),
        (["--lossless", "4", "--correction-interval", "4"], ["leave out --correction-interval"]),
        (["--lossless", "4", "--method", "full"], ["--method full", "--lossless"]),
        (["--budget", "2.5"], ["--budget 2.5: a fraction of the context lies in (0, 1]"]),
    ],
)
def test_bad_options(run, options, words, monkeypatch):
    """Found before anything is fetched or loaded."""
    monkeypatch.setattr("tidaldecode.models.demo.demo_model_folder", lambda report: 1 / 0)
    assert_one_line(run("generate", "Hello", *options), *words)


def test_a_model_without_a_chat_template_gets_its_special_tokens(run, tiny, tiny_folder, tmp_path, byte_tokenizer):
    from tokenizers.processors import TemplateProcessing

    folder = shutil.copytree(tiny_folder, tmp_path / "with-bos")
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer.save_pretrained(folder)
    _, out, _ = run("generate", "abc", "--model", str(folder), *tiny[2:], "--json", "--max-new-tokens", "2")
    assert json.loads(out)["context_tokens"] == 4


def test_a_stop_says_so(run, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tidaldecode.cli.prompt.PromptOptions.read", stop)
    assert run("generate", "Hello") == (130, "", "tidaldecode: stopped\n")


def test_no_command_shows_the_help(run):
    status, out, err = run()
    assert status == 2
    assert "generate" in out
    assert err == ""


@pytest.mark.usefixtures("no_model")
def test_bad_prompts(run, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    for name, words in {
        "missing.txt": "does not exist",
        "empty.txt": "is empty",
        "latin.txt": "is not UTF-8 (byte 2)",
        ".": "can't be read",
    }.items():
        assert_one_line(run("generate", "--prompt-file", str(tmp_path / name)), words)
    assert_one_line(run("generate", "--prompt-file", "a\0b"), "can't be read: embedded null byte")
    assert_one_line(run("generate", ""), "the prompt is empty")
    assert_one_line(run("generate", stdin=b""), "the prompt is empty")


@pytest.mark.usefixtures("no_model")
def test_prompt_longer_than_the_models_positions(run, tiny):
    words = ["the prompt has 520 tokens, with 4 new ones 524", "512 positions", "shorten the prompt by 12 tokens"]
    assert_one_line(run("generate", "abcdefgh" * 65, *tiny, "--max-new-tokens", "4"), *words)


@pytest.mark.usefixtures("no_model")
def test_plans_that_do_not_fit(run, tiny, tmp_path):
    assert_one_line(
        run("generate", "Hello", *tiny[:2], "--plan", "smollm2-135m"), "made for another model, smollm2-135m"
    )
    assert_one_line(run("generate", "Hello", *tiny[:2]), "no shipped plan was made for", "'paper'")
    short = plan_for(FAMILIES["llama"](num_hidden_layers=5))
    short.save(tmp_path / "short.json")
    message = "the plan has 5 roles, but the model has 7 layers"
    assert_one_line(run("generate", "Hello", *tiny[:2], "--plan", str(tmp_path / "short.json")), message)
    fields = json.loads((tmp_path / "short.json").read_text())
    (tmp_path / "wrong.json").write_text(json.dumps(fields | {"page_size": 16}))
    message = "page_size: unknown key"
    assert_one_line(run("generate", "Hello", *tiny[:2], "--plan", str(tmp_path / "wrong.json")), "wrong.json", message)


@pytest.mark.usefixtures("no_model")
def test_unsupported_architecture(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert_one_line(run("generate", "Hello", "--model", str(tmp_path)), "'t5'", "encoder-decoder", "llama")


def test_the_check_of_the_architecture_needs_no_weights():
    check_architecture(FAMILIES["llama"]())


def test_help(run):
    for options in (["--help"], ["generate", "--help"]):
        status, out, _ = run(*options)
        assert status == 0
        assert "Usage" in out


def test_results_do_not_name_the_folders_of_this_machine(monkeypatch):
    arguments = ["--results", "/home/me/ops.json", "--plan", "paper,/home/me/my.json", "--output=/home/me/out"]
    monkeypatch.setattr(sys, "argv", ["/opt/bin/tidaldecode", "bench", *arguments, "--seed", "1"])
    command = "tidaldecode bench --results ops.json --plan paper,my.json --output=out --seed 1"
    assert environment(torch.device("cpu"))["command"] == command
