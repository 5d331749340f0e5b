"""Mistakes that need no model are told before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from command_line import assert_one_line
from families import FAMILIES, plan_for
from tidaldecode import InputError, TidalPlan
from tidaldecode.cli.outline import outline_of
from tidaldecode.models import find_model, gguf_of
from tidaldecode.texts.prompt import Prompt

_TELL = """
import contextlib, io, json, sys
from tidaldecode.cli import main

told = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["tidaldecode", *arguments]
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main()
    told.append([err.getvalue(), "torch" in sys.modules])
print(json.dumps(told))
"""


@pytest.fixture
def no_model(monkeypatch):
    """Reading a model's files fails the test."""
    monkeypatch.setattr("tidaldecode.models.ModelFiles._read", lambda *arguments, **options: 1 / 0)


def test_mistakes_that_need_no_pytorch(tiny_folder, tmp_path):
    """Of every command: missing files, plans for other models, prompts and contexts that are too long."""
    plan_for(FAMILIES["llama"](num_hidden_layers=5)).save(tmp_path / "five.json")
    (tmp_path / "long.txt").write_text("Call me Ishmael. " * 40)
    (tmp_path / "short.txt").write_text("Call me Ishmael.")
    model, text = ("--model", str(tiny_folder)), ("--text", str(tmp_path / "short.txt"))
    output = ("--output", str(tmp_path / "x.json"))
    five, long = str(tmp_path / "five.json"), str(tmp_path / "long.txt")
    other = "the plan has 5 roles, but the model has 7 layers"
    beyond = "tokens is beyond the model's 512 positions"
    mistakes = {
        ("generate", "--prompt-file", "nowhere.txt"): "nowhere.txt does not exist",
        ("generate", "Hi", "--model", "./nowhere"): "model folder ./nowhere does not exist",
        ("generate", "Hi", "--model", "x.GGUF"): "model file x.GGUF does not exist",
        ("generate", "Hi", *model, "--plan", "nowhere.json"): "nowhere.json does not exist",
        ("generate", "Hi", *model, "--plan", five): other,
        ("generate", "Hi", *model, "--plan", "llama-3-8b"): "made for another model, llama-3-8b",
        ("generate", "Hi", *model): "no shipped plan was made for",
        (
            "generate",
            "--prompt-file",
            long,
            *model,
            "--plan",
            "paper",
        ): "the prompt has 680 tokens, with 128 new",
        ("calibrate", "--text", "nowhere.txt", *output): "nowhere.txt does not exist",
        ("calibrate", *text, *model, *output): beyond,
        ("calibrate", *text, "--model", "./nowhere", *output): "model folder ./nowhere does not exist",
        ("coherence", "--text", "nowhere.txt"): "nowhere.txt does not exist",
        ("coherence", *text, *model): beyond,
        ("coherence", *text, "--budget", "4090"): "budget 4090 leaves nothing to choose",
        ("coherence", *text, "--sink-tokens", "300"): "300 sinks, the new token and a chosen one make 302",
        ("eval", "ppl", "--text", "nowhere.txt"): "nowhere.txt does not exist",
        ("eval", "ppl", *text, *model, "--plan", five): other,
        ("eval", "ppl", *text, *model, "--method", "full"): beyond,
        ("eval", "needle", "--haystack", "nowhere.txt"): "nowhere.txt does not exist",
        ("eval", "needle", "--haystack", text[1], *model, "--plan", five): other,
        ("eval", "needle", "--haystack", text[1], *model, "--plan", "paper"): beyond,
        ("eval", "correction", "--text", "nowhere.txt"): "nowhere.txt does not exist",
        ("eval", "correction", *text, *model, "--plan", five): other,
        ("eval", "correction", *text, *model, "--plan", "paper"): beyond,
        ("eval", "lm-eval", "--tasks", "x", "--model", "./nowhere"): "model folder ./nowhere does not exist",
        ("eval", "lm-eval", "--tasks", "x", *model, "--plan", five): other,
        ("eval", "lm-eval", "--tasks", "x", "--include-path", "nowhere"): "--include-path nowhere is no folder",
        ("bench", "decode", "--model", "./nowhere"): "model folder ./nowhere does not exist",
        ("bench", "decode", *model, "--plan", five): other,
        ("bench", "decode", "--plan", "nowhere.json"): "nowhere.json does not exist",
        ("bench", "decode", "--config", "nothing"): "no config 'nothing'",
        ("bench", "ops", "--results", "nowhere/ops.json"): "the folder nowhere does not exist",
        ("report", "nowhere"): "nowhere is no folder",
    }
    command = [sys.executable, "-c", _TELL, json.dumps(list(mistakes))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for (arguments, words), (line, pytorch) in zip(mistakes.items(), json.loads(done.stdout), strict=True):
        assert words in line and line.startswith("tidaldecode: ") and line.count("\n") == 1, (arguments, line)
        assert not pytorch, arguments


def test_the_tokenizer_alone_counts_as_the_models_own(tiny_folder, demo_files, demo_tokenizer, byte_tokenizer):
    """With a chat template and without one."""
    prompt = Prompt("Call me Ishmael. Some years ago, don't ask, 1851." * 3, "Who?")
    for name, tokenizer in ((str(tiny_folder), byte_tokenizer), (demo_files.name, demo_tokenizer)):
        alone = outline_of(name).tokenizer()
        assert prompt.token_ids(alone) == prompt.token_ids(tokenizer)


def test_outlines_say_what_configurations_say(tiny_folder, tmp_path):
    """A configuration that leaves something open, or can't be read, refuses nothing."""
    outline, config = outline_of(str(tiny_folder)), find_model(str(tiny_folder)).config()
    assert outline.name == config.name_or_path and outline.positions == config.max_position_embeddings
    assert outline.shape == {"num_layers": 7, "num_query_heads": 6, "num_kv_heads": 2, "head_dim": 16}
    TidalPlan.paper(7).save(tmp_path / "seven.json")
    for text in ('{"num_hidden_layers": 7, "head_dim": null, "max_position_embeddings": true}', "{", "[]"):
        (tmp_path / "config.json").write_text(text)
        outline = outline_of(str(tmp_path))
        assert outline.shape == ({"num_layers": 7} if "layers" in text else {}) and outline.positions is None
        outline.check_context(10**9)
        outline.check_plan("auto")
        outline.check_plan(str(tmp_path / "seven.json"))
    assert outline_of("nobody/nothing").folder is outline_of("not an id").folder is None


@pytest.mark.usefixtures("no_model")
def test_names_of_gguf_files(run, tmp_path):
    """In any case, or by the folder that holds one alone; what else it may be is said."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "MODEL.GGUF").write_bytes(b"")
    for name in ("one/MODEL.GGUF", "one"):
        assert gguf_of(str(tmp_path / name)).name == "MODEL.GGUF"
    (tmp_path / "one" / "second.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 2 GGUF files \(MODEL\.GGUF, second\.gguf\): give one of them"):
        find_model(str(tmp_path / "one"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    result = run("generate", "Hi", "--plan", "paper", "--model", str(tmp_path / "model.safetensors"))
    assert_one_line(result, "is no GGUF file: of safetensors give the folder")
