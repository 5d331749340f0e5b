"""`eval ppl`: which tokens are scored by whose logits, what is kept and taken up again, and bad input."""

from __future__ import annotations

import codecs
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from command_line import assert_one_line
from families import FAMILIES, plan_for
from tidaldecode import InputError, TidalCache, TidalPlan, apply
from tidaldecode.evaluate import study
from tidaldecode.evaluate.perplexity import perplexity
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.evaluate.study import measure
from tidaldecode.methods.method import METHOD_KEY, Method, check_methods, check_plan_names, every_method
from tidaldecode.models import model_shape
from tidaldecode.results.cells import Cells, read_cells
from tidaldecode.texts.text import Text, text_parts
from tidaldecode.texts.windows import Windows

SETTINGS = Windows(context=64, decode=40, windows=3, offset=5, stride=30)
TEXT = Text(torch.randint(2, 260, (129,), generator=torch.Generator().manual_seed(3), dtype=torch.int32))


@pytest.fixture
def llama(tiny):
    return apply(tiny("llama"), "full")


KEY = perplexity(TEXT, SETTINGS, ()).key


def scored(model, methods, cells=None, on_progress=study.quiet, settings=SETTINGS):
    return measure(perplexity(TEXT, settings, methods), model, cells, on_progress)


def methods_for(model, *budgets):
    return tuple(
        every_method(("tidal", "streaming"), budgets, plan=[plan_for(model.config).model_copy(update={"name": "p"})])
    )


def step_by_step(model, method, window):
    """Mean negative log-likelihood of the decoded tokens, by real decode steps."""
    cache = TidalCache(model.config, model._tidaldecode.plan, len(window))
    first = len(window) - SETTINGS.decode
    model(window[None, : first - 1], past_key_values=cache)
    cache.attention = method.attention(model_shape(model.config), len(window))
    losses = []
    for position in range(first - 1, len(window) - 1):
        logits = model(window[None, position : position + 1], past_key_values=cache).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[window[position + 1]].item())
    return losses


def test_scores_are_those_of_decode_steps(llama):
    methods = methods_for(llama, 16)
    rows = scored(llama, methods)
    assert [(row.variant.method, row.budget, row.windows) for row in rows] == [
        ("full", None, 3), ("tidal", 16, 3), ("streaming", 16, 3)
    ]  # fmt: skip
    nll = {}
    for row, method in zip(rows, (Method.named("full"), *methods), strict=True):
        losses = [step_by_step(llama, method, TEXT.tokens[start : start + 64].long()) for start in (5, 35, 65)]
        means = nll[method.name] = [statistics.fmean(window) for window in losses]
        assert row.nll == pytest.approx(statistics.fmean(means), abs=1e-4)
        assert (row.first_position, row.bin_tokens, row.tokens) == (24, 32, 120)
        bins = [statistics.fmean(x for window in losses for x in window[part]) for part in (slice(32), slice(32, 40))]
        assert row.nll_by_position == pytest.approx(bins, abs=1e-4)
        gaps = [one - other for one, other in zip(means, nll["full"], strict=True)]
        assert row.gap == pytest.approx(statistics.fmean(gaps), abs=1e-4)
        assert row.gap_stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(3), abs=1e-4)
    assert rows[1].gap != 0 and rows[2].gap != 0


def test_rows_say_what_a_step_reads(llama):
    """Codes of keys among it."""
    plain = plan_for(llama.config).model_copy(update={"name": "plain"})
    roles = tuple("quantized_select" if role == "select" else role for role in plain.roles)
    codes = TidalPlan.validated(**{**plain.model_dump(), "roles": roles, "key_bits": 2, "name": "codes"})
    methods = [Method.named("tidal", 8, plan) for plan in (plain, codes)] + [Method.named("oracle", 8)]
    rows = scored(llama, methods, settings=replace(SETTINGS, windows=1))
    shape = model_shape(llama.config)
    shares = [method.attention(shape, 64).kv_read_fraction(64) for method in (Method.named("full"), *methods)]
    assert [row.kv_read_fraction for row in rows] == pytest.approx(shares, abs=1e-6)
    assert shares[0] == 1 and shares[2] < shares[1]


def test_full_attention_is_the_models_own(llama, tiny):
    """No cache, no plan: the likelihoods of the last tokens of each window."""
    (row,) = scored(llama, ())
    means = []
    for start in SETTINGS.starts:
        window = TEXT.window(start, 64)
        scores = tiny("llama")(window, use_cache=False).logits.log_softmax(-1)[0, 23:-1]
        means.append(-scores.gather(1, window[0, 24:, None]).mean().item())
    assert row.nll == pytest.approx(statistics.fmean(means), abs=1e-4)
    assert (row.gap, row.full_nll) == (0, row.nll)


def test_each_window_is_read_once(llama, monkeypatch):
    read, original = [], HeldPrompt.read

    def read_prompt(held, window, decode):
        read.append(window[0, 0].item())
        original(held, window, decode)

    monkeypatch.setattr(HeldPrompt, "read", read_prompt)
    progress = []
    scored(llama, methods_for(llama, 16, 24), on_progress=lambda *what: progress.append(what))
    assert read == [TEXT.tokens[start].item() for start in (5, 35, 65)]
    assert [done for done, _, _ in progress] == list(range(19))
    assert {total for _, total, _ in progress} == {18}
    assert progress[0][2] == "window 1 of 3: reading"
    assert progress[2][2] == "window 1 of 3: tidal p 16"


def test_a_stopped_run_goes_on(llama, tmp_path, monkeypatch):
    methods, path = methods_for(llama, 16), tmp_path / "ppl.jsonl"
    expected = scored(llama, methods)
    original, done = HeldPrompt.attend_by, []

    def stop_at(count):
        def attend_by(held, method, context):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append((held.window[0, 0].item(), method.name))
            original(held, method, context)

        monkeypatch.setattr(HeldPrompt, "attend_by", attend_by)

    for count in (2, 7):
        stop_at(count)
        with Cells.open(path, {"kind": "ppl"}, KEY) as cells, pytest.raises(KeyboardInterrupt):
            scored(llama, methods, cells)
        assert len(read_cells(path).rows) == count
    stop_at(None)
    with Cells.open(path, {"kind": "ppl"}, KEY) as cells:
        found = scored(llama, methods, cells)
        assert len(done) == len(set(done)) == 9
        for row, wanted in zip(found, expected, strict=True):
            assert row.nll == pytest.approx(wanted.nll, abs=1e-6)
        # other windows and budgets of the same file are left out
        scored(llama, methods_for(llama, 24), cells, settings=Windows(64, 40, 1, 20))
        assert scored(llama, methods, cells) == found
    assert len(done) == 12


def test_plans_of_one_name_are_never_mixed(llama):
    cells, plan = Cells(KEY), plan_for(llama.config).model_copy(update={"name": "p"})
    scored(llama, [Method.named("tidal", 16, plan)], cells)
    scored(llama, [Method.named("tidal", 24, plan.with_budget(32))], cells)  # only the budget differs
    other = plan.model_copy(update={"sink_tokens": 2})
    with pytest.raises(InputError, match="two plans are named 'p'"):
        scored(llama, [Method.named("tidal", 16, other)], cells)
    with pytest.raises(InputError, match="two plans are named 'p'"):
        check_methods([Method.named("tidal", 16, plan), Method.named("tidal", 16, other)], llama.config, 64)
    check_plan_names([Method.named("full").key(), Method.named("quest", 64).key()])


def test_a_likelihood_that_is_not_finite_is_no_result(llama, tmp_path):
    llama.half().lm_head.weight.data.mul_(60000)
    overflows = pytest.raises(InputError, match="float16 overflows; give --dtype bfloat16 or float32")
    with Cells.open(tmp_path / "ppl.jsonl", {"kind": "ppl"}, KEY) as cells, overflows:
        scored(llama, [], cells)
    assert read_cells(tmp_path / "ppl.jsonl").rows == []
    llama.float().lm_head.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="full at token 5: .* weights are damaged"):
        scored(llama, [])


def test_what_tells_methods_apart(llama):
    plan = plan_for(llama.config).model_copy(update={"name": "p"})
    names = ("full", "tidal", "quest", "streaming", "oracle")
    methods = list(
        every_method(names, (32, 0.5), plan=[plan], selection=("per_head", "unified"), page_size=(8,), full_layers=(0,))
    )
    keys = [method.key() for method in methods]
    assert [method.label for method in methods] == [
        "full", "tidal p 32", "tidal p 0.5", "quest 32", "quest 0.5", "streaming 32", "streaming 0.5",
        "oracle per_head 32", "oracle unified 32", "oracle per_head 0.5", "oracle unified 0.5",
    ]  # fmt: skip
    assert {tuple(key) for key in keys} == {METHOD_KEY}
    assert len({tuple(key.values()) for key in keys}) == len(keys)
    assert [(key["page_size"], key["full_layers"]) for key in keys[3:5]] == [(8, 0)] * 2
    assert [Method.named(name, 32, full_layers=layers).key()["full_layers"] for name, layers in (
        ("quest", None), ("oracle", None), ("oracle", 0), ("oracle", 2), ("streaming", 2)
    )] == [2, None, None, 2, None]  # fmt: skip
    assert keys[1]["plan_digest"] == keys[2]["plan_digest"]
    (own,) = every_method(("tidal",), plan=[plan])
    assert own.key()["budget"] == plan.token_budget


# ---- texts


def test_a_text_in_parts(tmp_path, byte_tokenizer):
    for name, words in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "no")):
        (tmp_path / name).write_text(words)
    text = Text.tokenize(byte_tokenizer, text_parts(tmp_path))
    assert byte_tokenizer.decode(text.tokens.tolist()) == "first\nsecond\n"
    assert text.tokens.dtype == torch.int32
    assert byte_tokenizer.decode(text.window(6, 6)[0]) == "second"
    alone = Text.tokenize(byte_tokenizer, text_parts(tmp_path / "a.txt"))
    assert text.digest() != alone.digest() == Text.tokenize(byte_tokenizer, ["first"]).digest()


def test_a_text_from_another_system(tmp_path):
    """A byte order mark is no part of it, and line ends are one character."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo\rthree")
    assert "".join(text_parts(tmp_path)) == "one\ntwo\nthree\n" * 2


def test_windows_begin_as_the_tokenizer_begins():
    text = Text(torch.arange(10, 20, dtype=torch.int32), prefix=(1,))
    assert text.window(2, 4).tolist() == [[1, 12, 13, 14]]
    Windows(context=11, decode=2, windows=1).check_text(text)
    with pytest.raises(InputError, match="the text has 10 tokens, 1 too few for 1 windows of 12 tokens"):
        Windows(context=12, decode=2, windows=1).check_text(text)


def test_wrong_texts(tmp_path, byte_tokenizer):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "none").mkdir()
    for path, message in ((tmp_path / "latin.txt", r"not UTF-8 \(byte 3\)"), (tmp_path / "none", "no .txt file")):
        with pytest.raises(InputError, match=message):
            Text.tokenize(byte_tokenizer, text_parts(path))
    with pytest.raises(InputError, match="the text is empty"):
        Text.tokenize(byte_tokenizer, [""])


def test_models_with_sliding_windows(tiny):
    with pytest.raises(InputError, match="'gemma3_text' has layers with a sliding window"):
        check_methods([Method.named("full")], FAMILIES["gemma3_text"](), 64)


# ---- the command


@pytest.fixture
def command(tiny_folder, tmp_path):
    """A run that takes a second."""
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 20)
    return [
        "eval", "ppl", "--model", str(tiny_folder), "--text", str(tmp_path / "text.txt"), "--context", "96",
        "--decode", "20", "--windows", "2", "--stride", "200", "--plan", "paper",
    ]  # fmt: skip


def test_eval_ppl(run, command, tmp_path):
    output = str(tmp_path / "results")
    status, out, err = run(*command, "--budget", "16", "--output", output, "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert {"nll", "full_nll", "gap", "windows", "text", "context", "decode", "stride", "offset"} <= answer.keys()
    assert answer["windows"] == 2 and answer["text"] == "text.txt" and len(answer["rows"]) == 2
    row = answer["rows"][1]
    assert (row["method"], row["plan"], row["budget"], row["windows"]) == ("tidal", "paper", 16, 2)
    assert answer["gap"] == row["gap"] == pytest.approx(answer["nll"] - answer["full_nll"])
    assert [Path(figure).name for figure in answer["figures"]] == ["ppl_budgets.png", "ppl_positions.png"]
    assert all(Path(figure).read_bytes()[:4] == b"\x89PNG" for figure in answer["figures"])
    status, out, err = run(*command, "--method", "full", "--output", str(tmp_path / "full"), "--json")
    assert [Path(figure).name for figure in json.loads(out)["figures"]] == ["ppl_positions.png"]  # there is no gap
    file = read_cells(tmp_path / "results" / "ppl.jsonl")
    assert len(file.rows) == 4 and file.header["model"] == "tiny-llama0"
    assert str(tmp_path) not in json.dumps(file.header)
    more = ["--method", "quest,streaming,oracle", "--budget", "16,0.5", "--selection", "per_head,unified"]
    status, out, err = run(*command, *more, "--full-layers", "0", "--page-size", "4", "--output", output, "--json")
    assert status == 0, err
    assert "50\N{NO-BREAK SPACE}%" in err and " 0.5 " not in err
    answer = json.loads(out)
    assert len(answer["rows"]) == 1 + 2 + 2 + 4
    assert "gap" not in answer
    assert len(read_cells(tmp_path / "results" / "ppl.jsonl").rows) == 4 + 2 * 8
    before = read_cells(tmp_path / "results" / "ppl.jsonl").rows
    assert run(*command, *more, "--full-layers", "0", "--page-size", "4", "--output", output)[0] == 0
    assert read_cells(tmp_path / "results" / "ppl.jsonl").rows == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "magic"], ["--method 'magic' is unknown", "oracle"]),
        (["--method", "full", "--budget", "64"], ["leave out --budget"]),
        (["--method", "quest,tidal"], ["--method quest needs a --budget"]),
        (["--budget", "1.5"], ["--budget 1.5"]),
        (["--budget", "1"], ["budget 1 is too small"]),
        (["--method", "oracle", "--budget", "8", "--selection", "best"], ["--selection 'best' is unknown"]),
        (["--method", "quest", "--budget", "64", "--page-size", "12"], ["page size 12 is no power of two"]),
        (["--plan", "nowhere.json"], ["nowhere.json does not exist"]),
        (["--text", "nowhere.txt"], ["nowhere.txt does not exist"]),
        (["--windows", "9"], ["the text has 880 tokens, 816 too few for 9 windows of 96 tokens"]),
        (["--offset", "600"], ["16 too few"]),
        (["--context", "513"], ["a context of 513 tokens is beyond the model's 512 positions"]),
        (["--context", "2", "--decode", "1"], ["a context of 2 is too small: 3 tokens at least"]),
        (["--decode", "95"], ["95 decoded tokens leave no prompt", "decode 94 at most"]),
    ],
)
def test_bad_input_before_the_model_is_loaded(run, command, options, words, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    assert_one_line(run(*command, *options), *words)


def test_results_of_another_text_are_refused(run, command, tmp_path):
    output = ["--output", str(tmp_path / "results"), "--budget", "16"]
    assert run(*command, *output)[0] == 0
    (tmp_path / "text.txt").write_text("Another text. " * 80)
    assert_one_line(run(*command, *output), "ppl.jsonl", "text")
    (tmp_path / "file").write_text("")
    assert_one_line(run(*command, "--output", str(tmp_path / "file")), "is a file: give a folder")


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


def test_results_of_another_model_of_the_same_name_are_refused(run, command, tmp_path, tiny_folder):
    for name in ("a", "b"):
        shutil.copytree(tiny_folder, tmp_path / name / "final")
    options = ["--budget", "16", "--output", str(tmp_path / "results"), "--model"]
    assert run(*command, *options, str(tmp_path / "a" / "final"))[0] == 0
    weights = tmp_path / "b" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert_one_line(run(*command, *options, str(tmp_path / "b" / "final")), "ppl.jsonl", "model_digest")


def test_the_plan_of_a_file_goes_by_its_stem(run, command, tmp_path):
    plan = TidalPlan.paper(7).model_copy(update={"name": None, "token_budget": 12})
    plan.save(tmp_path / "mine.json")
    status, out, err = run(*command, "--plan", str(tmp_path / "mine.json"), "--json")
    assert status == 0, err
    assert [(row["plan"], row["budget"]) for row in json.loads(out)["rows"]] == [(None, None), ("mine", 12)]
