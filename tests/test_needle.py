"""`eval needle`: the prompts, who counts as having found a needle, what is kept and taken up again, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from command_line import assert_one_line
from families import plan_for
from tidaldecode import InputError, TidalCache, TidalPlan, apply
from tidaldecode.evaluate import study
from tidaldecode.evaluate.needle import needles
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.evaluate.study import measure
from tidaldecode.methods.method import Method, every_method
from tidaldecode.models import model_shape
from tidaldecode.results.cells import Cells, read_cells
from tidaldecode.texts.haystack import NeedleSettings, needle_cases
from tidaldecode.texts.text import Text

SETTINGS = NeedleSettings(lengths=(120, 160), depths=3, repeats=2)
WORDS = "All work and no play makes Jack a dull boy. " * 20


@pytest.fixture
def llama(tiny):
    return apply(tiny("llama"), "full")


@pytest.fixture
def haystack(byte_tokenizer):
    return Text.tokenize(byte_tokenizer, [WORDS])


@pytest.fixture
def cases(byte_tokenizer, haystack, llama):
    return needle_cases(byte_tokenizer, haystack, SETTINGS, llama.config)


def find_needles(model, haystack, cases, methods, cells=None, on_progress=study.quiet):
    return measure(needles(haystack, cases, SETTINGS, methods), model, cells, on_progress)


def methods_for(model, *budgets):
    plan = plan_for(model.config, "unified").model_copy(update={"name": "p"})
    return tuple(every_method(("tidal", "quest", "streaming", "oracle"), budgets, plan=[plan], page_size=(4,)))


def generated(model, prompt, method, tokens):
    """What `generate` says when the prompt's last token is decoded under the method too."""
    length = prompt.shape[1]
    cache = TidalCache(model.config, model._tidaldecode.plan, length + tokens)
    model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
    cache.attention = method.attention(model_shape(model.config), length)
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    return tuple(model.generate(prompt, past_key_values=cache, **options)[0, length:].tolist())


# ---- prompts


def test_prompts(byte_tokenizer, cases, haystack):
    assert [(case.length, case.depth, case.repeat) for case in cases] == [
        (length, depth, repeat) for length in (120, 160) for depth in (0, 0.5, 1) for repeat in (0, 1)
    ]
    for case in cases:
        prompt = case.prompt(haystack)
        assert prompt.shape == (1, case.length) and prompt.dtype == torch.int64
        said, answer = byte_tokenizer.decode(prompt[0]), byte_tokenizer.decode(list(case.answer))
        before, found, after = said.partition(f" number is:{answer}.")
        assert found and len(answer) == len(" 1234567") and answer[1:].isdigit()
        before, magic, city = before.rpartition(" The special magic ")
        assert magic
        hay = after.removesuffix(f"\n\nThe special magic {city} number is:")
        assert hay != after and before + hay in WORDS
        assert len(before) == round(case.depth * len(before + hay))
    assert len({(case.needle, case.start) for case in cases}) == len(cases)


def test_more_repeats_and_lengths_keep_the_cases(byte_tokenizer, cases, haystack, llama):
    more = replace(SETTINGS, lengths=(140, 120, 160), repeats=3)
    assert set(cases) < set(needle_cases(byte_tokenizer, haystack, more, llama.config))
    other = needle_cases(byte_tokenizer, haystack, replace(SETTINGS, seed=1), llama.config)
    assert not set(cases) & set(other)


def test_prompts_begin_as_the_tokenizer_begins(byte_tokenizer, haystack, llama):
    text = Text(haystack.tokens, prefix=(1,))
    first, _, last = needle_cases(byte_tokenizer, text, NeedleSettings((120,), 3), llama.config)
    for case in (first, last):
        assert case.prompt(text).shape == (1, 120)
        assert case.prompt(text)[0, 0] == 1
    assert first.prompt(text)[0, 1 : 1 + len(first.needle)].tolist() == list(first.needle)


def test_an_answer_that_the_tokenizer_merges_with_the_question(haystack, llama):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index + 2 for index, letter in enumerate(alphabet)} | {":Ġ": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    (case,) = needle_cases(merging, haystack, NeedleSettings((120,), 1), llama.config)
    assert merging.decode(case.question).endswith("number is:")
    assert merging.decode(case.answer)[:1] == " " and len(case.answer) == 8


# ---- who has found it


def test_found_is_what_generate_says(llama, cases, haystack):
    """Each method's answer in turn is the one that is asked for: that method has found it, and who agrees with it."""
    methods = (Method.named("full"), *methods_for(llama, 8), Method.named("streaming", 0.2))
    said = [generated(llama, cases[0].prompt(haystack), method, 8) for method in methods]
    assert len(set(said)) > 2
    asked = [replace(cases[0], repeat=index, answer=answer) for index, answer in enumerate(dict.fromkeys(said))]
    cells = Cells(needles(haystack, asked, SETTINGS, ()).key)
    find_needles(llama, haystack, asked, methods, cells)
    for case in asked:
        keys = ({"length": 120, "depth": 0.0, "repeat": case.repeat, **method.key()} for method in methods)
        assert [cells.find(**key)["correct"] for key in keys] == [answer == case.answer for answer in said]


def test_summaries(llama, cases, haystack):
    full, streaming = find_needles(llama, haystack, cases, [Method.named("streaming", 8)])
    assert (full.variant.method, full.budget, streaming.variant.method, streaming.budget) == (
        "full", None, "streaming", 8
    )  # fmt: skip
    for row in (full, streaming):
        assert row.total == 12 and row.of_length(120)[1] == 6
        assert [(cell.length, cell.depth, cell.total) for cell in row.cells] == [
            (length, depth, 2) for length in (120, 160) for depth in (0, 0.5, 1)
        ]


def test_a_stopped_run_goes_on(llama, cases, haystack, tmp_path, monkeypatch):
    methods, path, cases = methods_for(llama, 8)[:2], tmp_path / "needle.jsonl", cases[:3]
    key = needles(haystack, cases, SETTINGS, ()).key
    read, decoded, stop = [], [], 4
    read_prompt, attend_by = HeldPrompt.read, HeldPrompt.attend_by

    def counted_read(held, prompt, decode):
        read.append(prompt)
        read_prompt(held, prompt, decode)

    def counted_decode(held, method, context):
        if len(decoded) == stop:
            raise KeyboardInterrupt
        decoded.append((context, method.name))
        attend_by(held, method, context)

    monkeypatch.setattr(HeldPrompt, "read", counted_read)
    monkeypatch.setattr(HeldPrompt, "attend_by", counted_decode)
    with Cells.open(path, {"kind": "needle"}, key) as cells, pytest.raises(KeyboardInterrupt):
        find_needles(llama, haystack, cases, methods, cells)
    assert len(read_cells(path).rows) == 4
    stop, progress = None, []
    with Cells.open(path, {"kind": "needle"}, key) as cells:
        find_needles(llama, haystack, cases, methods, cells, lambda *what: progress.append(what))
        assert len(decoded) == 9 and len(read) == 2 + 2  # the second case was read, and is read again
        find_needles(llama, haystack, cases, methods, cells)
    assert len(decoded) == 9 and len(read) == 4
    assert {total for _, total, _ in progress} == {12}
    assert progress[-1] == (12, 12, "done")


def test_plans_of_one_name_are_never_mixed(llama, cases, haystack):
    plan = plan_for(llama.config).model_copy(update={"name": "p"})
    methods = [Method.named("tidal", 16, plan), Method.named("tidal", 16, plan.model_copy(update={"sink_tokens": 2}))]
    with pytest.raises(InputError, match="two plans are named 'p'"):
        find_needles(llama, haystack, cases, methods)


# ---- the command


@pytest.fixture
def command(tiny_folder, tmp_path):
    """A run that takes a second."""
    (tmp_path / "hay").mkdir()
    (tmp_path / "hay" / "text.txt").write_text(WORDS)
    return [
        "eval", "needle", "--model", str(tiny_folder), "--haystack", str(tmp_path / "hay"), "--lengths", "120,160",
        "--depths", "2", "--plan", "paper",
    ]  # fmt: skip


def test_eval_needle(run, command, tmp_path):
    status, out, err = run(*command, "--budget", "16", "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert answer["figure"] is None and answer["haystack"] == "hay" and answer["lengths"] == [120, 160]
    assert 0 <= answer["accuracy"] <= 1 and 0 <= answer["full_accuracy"] <= 1
    assert len(answer["rows"]) == 2 and len(answer["cells"]) == 2 * 4
    cell = answer["cells"][-1]
    assert (cell["method"], cell["plan"], cell["budget"], cell["length"], cell["depth"], cell["total"]) == (
        "tidal", "paper", 16, 160, 1, 1
    )  # fmt: skip
    assert {row["kv_read_fraction"] for row in answer["cells"] if row["method"] == "full"} == {1}
    at_120, at_160 = (cell["kv_read_fraction"] for cell in answer["cells"][-4::2])
    assert 0 < at_160 < at_120 < 1 and answer["rows"][1]["kv_read_fraction"] == pytest.approx((at_120 + at_160) / 2)
    assert "KV read" in err
    output = tmp_path / "results"
    more = ["--method", "tidal,streaming", "--budget", "16,0.5", "--lengths", "120", "--output", str(output)]
    status, out, err = run(*command, *more, "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert len(answer["rows"]) == 5 and answer["accuracy"] is None
    assert answer["figure"] == str(output / "needle.png")
    assert (output / "needle.png").read_bytes().startswith(b"\x89PNG")
    file = read_cells(output / "needle.jsonl")
    assert len(file.rows) == 5 * 2 and file.header["kind"] == "needle"
    assert str(tmp_path) not in json.dumps(file.header)
    assert run(*command, *more, "--repeats", "2")[0] == 0
    rows = read_cells(output / "needle.jsonl").rows
    assert len(rows) == 5 * 4 and rows[:10] == file.rows
    assert_one_line(run(*command, *more, "--seed", "1"), "needle.jsonl", "seed 0", "seed 1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "magic"], ["--method 'magic' is unknown"]),
        (["--lengths", "many"], ["--lengths 'many'"]),
        (["--lengths", "80"], ["prompts of 80 tokens have no room for a haystack", "needle and question are"]),
        (["--lengths", "120,506"], ["506 tokens and answers of 8", "512 positions", "504 at most"]),
        (["--budget", "1"], ["budget 1 is too small"]),
        (["--plan", "nowhere.json"], ["nowhere.json does not exist"]),
        (["--haystack", "nowhere"], ["nowhere does not exist"]),
    ],
)
def test_bad_input_before_the_model_is_loaded(run, command, options, words, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    assert_one_line(run(*command, *options), *words)


def test_no_model_is_loaded_for_nothing(run, command, tmp_path, monkeypatch):
    """All is measured, or a plan's name stands for another in the file."""
    plan = TidalPlan.paper(7).model_copy(update={"name": None, "token_budget": 12})
    plan.save(tmp_path / "mine.json")
    options = ["--plan", str(tmp_path / "mine.json"), "--output", str(tmp_path / "results"), "--json"]
    status, before, err = run(*command, *options)
    assert status == 0, err
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    status, after, err = run(*command, *options)
    assert status == 0, err
    assert json.loads(after)["rows"] == json.loads(before)["rows"]
    plan.model_copy(update={"sink_tokens": 2}).save(tmp_path / "mine.json")
    assert_one_line(run(*command, *options), "two plans are named 'mine'")


def test_a_haystack_that_is_too_short(run, command, tmp_path):
    (tmp_path / "hay" / "text.txt").write_text("x" * 40)
    result = run(*command, "--lengths", "200")
    assert_one_line(result, "the haystack has 41 tokens", "too few for prompts of 200")
    missing = int(result[2].split("41 tokens, ")[1].split()[0])
    (tmp_path / "hay" / "text.txt").write_text("x" * (40 + missing))
    assert run(*command, "--lengths", "200", "--depths", "1", "--budget", "16")[0] == 0
