"""The page of `report`: what is on it, what is left out and said, and that nothing in a file can break it."""

from __future__ import annotations

import codecs
import errno
import importlib.util
import json
import os
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from command_line import assert_one_line
from tidaldecode.errors import InputError
from tidaldecode.methods.method import METHOD_KEY, Method
from tidaldecode.plan import ModelShape
from tidaldecode.plans import read_plan
from tidaldecode.report import articles, drawing, losses, overview, scores, speeds
from tidaldecode.report.article import Table
from tidaldecode.report.compared import compared
from tidaldecode.report.drawing import NARROW, WIDE, save_png
from tidaldecode.report.folder import Result, read_results
from tidaldecode.report.page import write_report
from tidaldecode.report.shares import SharesRead
from tidaldecode.results.cells import Cells
from tidaldecode.results.correction import rows_of
from tidaldecode.results.needles import needle_summary
from tidaldecode.results.perplexity import ppl_summary
from tidaldecode.results.rows import MethodSettings
from tidaldecode.results.tasks import lm_eval_summary

HOSTILE = "</title><script>alert('$x_1$')</script>&\"'"
ENVIRONMENT = {"command": "tidaldecode eval ppl --seed 7", "versions": {"torch": "2.11.0"}, "device": "NVIDIA H200"}
VOID = {"meta", "br", "path", "use", "link"}


class Page(HTMLParser):
    """Follows the tags of a page: what is open, all ids, all attributes that load something."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                self.loads.append(value)
            assert not name.startswith("on")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def ppl_cell(window: int, method: str, budget: float | None, gap: float, plan: str | None = None):
    nll = 3 + 0.1 * window + gap
    return {
        "window": window, "method": method, "plan": plan, "budget": budget, "nll": nll, "full_nll": 3 + 0.1 * window,
        "tokens": 32, "nll_by_position": [nll, nll + 0.5], "first_position": 96, "bin_tokens": 16,
    }  # fmt: skip


def needle_cell(length: int, depth: float, method: str, budget: int | None, correct: int, plan: str | None = None):
    return {
        "length": length, "depth": depth, "method": method, "plan": plan, "budget": budget, "correct": correct,
        "total": 4,
    }  # fmt: skip


PPL = [
    ppl_cell(window, method, budget, gap * (1 + 0.1 * window), plan)
    for window in (0, 1, 2)
    for method, budget, gap, plan in [
        ("full", None, 0.0, None), ("tidal", 64, 0.2, "shipped"), ("tidal", 256, 0.05, "shipped"),
        ("tidal", 64, 0.9, "paper"), ("streaming", 0.5, 0.3, None),
    ]
]  # fmt: skip
NEEDLES = [
    needle_cell(length, depth, method, budget, correct, plan)
    for length in (200, 400)
    for depth in (0.0, 0.5, 1.0)
    for method, budget, correct, plan in [("full", None, 4, None), ("tidal", 64, 3, "shipped"), ("quest", 64, 1, None)]
]
TASKS = [
    {
        "task": task, "method": method, "plan": None, "budget": budget, "samples": 20,
        "metrics": {
            "alias": task, f"{metric},none": 0.5, f"{metric}_stderr,none": 0.1, "loss": 3, "loss_stderr": "N/A",
        },
    }
    for task, metric in (("qa", "f1"), ("lists", "acc"))
    for method, budget in (("full", None), ("streaming", 64))
]  # fmt: skip
CORRECTION = [
    {
        "window": window, "mode": mode, "length": length, "method": "tidal", "plan": "shipped", "budget": budget,
        "nll": 3 + gap * (1 + window / 10), "ms_per_token": ms, "token_ids": [1, 2],
        **({"accepted_per_round": length - 0.5, "first_difference": window or None} if mode == "lossless" else {}),
    }
    for window in (0, 10)
    for mode, length, budget, gap, ms in [
        ("full", None, None, 0.0, 2.0), ("plain", None, 64, 0.2, 1.0), ("correction", 4, 64, 0.1, 1.6),
        ("lossless", 4, 64, 0.0, 1.25), ("lossless", 8, 64, 0.0, 1.0),
    ]
]  # fmt: skip
ANSWERS = [
    {
        "question": question, "draw": draw, "method": method, "plan": None, "budget": budget, "asked": "Who <b>?",
        "references": ["Ahab"], "task": "who says", "prompt_digest": "0", "prompt_tokens": 96, "cut": True,
        "text": f"{method} says <i>{question}", "token_ids": [1, 2], "tokens": 2, "ended": True, "nll": 0.5 + gap,
        "full_nll": 0.5, "repetition": 0.25, "loops": budget is not None, "rouge_l": 0.5, "f1": 0.75,
        "reference_rouge_l": 0.125, "reference_f1": 0.25, "kv_read_fraction": share,
    }
    for question in ("one", "two")
    for method, draw, budget, gap, share in [
        ("full", 0, None, 0.0, 1.0), ("full", 1, None, 0.125, 1.0), ("quest", 0, 64, 0.25, 0.2),
    ]
]  # fmt: skip
DECODE = {
    "model": "llama-tiny", "dtype": "bfloat16", "batch": 1, **ENVIRONMENT,
    "rows": [
        {
            "method": method, "context": context, "budget": budget, "step_ms": ms, "floor_ms": 1.0,
            "speedup_vs_full": 8 / ms, "kv_read_fraction": 0.1, "captured": True,
        }
        for context in (1024, 4096)
        for method, budget, ms in (("full", None, 8.0), ("tidal", 64, 4.0), ("tidal", 128, 3.2))
    ],
}  # fmt: skip
COHERENCE = {
    **ENVIRONMENT, "budget": 64, "recall": [[1.0, None, 0.5], [None, None, None], [None, None, 1.0]],
    "distance": [1.0, None, 0.5], "distances": {"unified": [1.0, None, 0.5], "per_head": [1.0, 0.25, 0.0]},
}  # fmt: skip
OPERATIONS = {
    "dtype": "bfloat16", "layers": 4, **ENVIRONMENT,
    "rows": [
        {
            "operation": operation, "heads": 4, "kv_heads": 2, "batch": 1, "context": 1024, "budget": budget, "us": us,
            "floor_us": 1.0, "over_sdpa": us / 10, "speedup_vs_full": speed_up,
        }
        for operation, budget, us, speed_up in [
            ("sdpa", None, 10.0, None), ("step full (sdpa)", None, 40.0, 1.0), ("step tidal", 64, 16.0, 2.5),
        ]
    ],
}  # fmt: skip


def write_cells(path: Path, kind: str, key: tuple[str, ...], rows: list[dict], model: str = "smollm2"):
    with Cells.open(path, {"kind": kind, "model": model, "context": 128}, key, ENVIRONMENT) as cells:
        for row in rows:
            cells.append(row)


def fill(folder: Path, model: str = "smollm2") -> Path:
    """A folder with one file of each kind."""
    write_cells(folder / "evaluation" / "ppl.jsonl", "ppl", ("window", "method", "plan", "budget"), PPL, model)
    key = ("length", "depth", "method", "plan", "budget")
    write_cells(folder / "evaluation" / "needle.jsonl", "needle", key, NEEDLES, model)
    write_cells(folder / "evaluation" / "tasks.jsonl", "lm-eval", ("task", "method", "budget"), TASKS, model)
    key = ("window", "mode", "length", "budget")
    write_cells(folder / "evaluation" / "correction.jsonl", "correction", key, CORRECTION, model)
    key = ("question", "draw", "method", "budget")
    write_cells(folder / "evaluation" / "answers.jsonl", "answers", key, ANSWERS, model)
    objects = {
        "decode": DECODE | {"model": model},
        "ops": OPERATIONS,
        "coherence": COHERENCE | {"model": model, "recalls": {"unified": COHERENCE["recall"], model: [[1.0]]}},
        "recall": {"model": model, "recall": [[1.0, 0.5], [0.25, 1.0]]},
        "plan": {"model": model, "calibration_gap": 0.03, "heldout_gap": 0.04, "seconds": 12.5},
        "found": {"found": {"full": {"generate": 48}, "paper": {"generate": 1}}, **ENVIRONMENT},
        "profile": {"rows": [{"kernel": "_attend_kernel", "grid": [8, 16], "us": 1.5}, {"kernel": model}]},
    }
    for name, content in objects.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def bare(tmp_path):
    """A folder with values alone, which are quickly on a page."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "found.json").write_text(json.dumps({"cases": 50, **ENVIRONMENT}))
    return tmp_path / "bare"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """The page of one file of each kind."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "results").mkdir()
    return write_report(fill(folder / "results"), folder / "report.html").output.read_text(encoding="utf-8")


@pytest.fixture
def page(text):
    return Page(text)


def test_every_kind_has_its_place(page):
    assert page.open == []
    for words in (
        "Quality",
        "Tasks",
        "Lossless decoding",
        "Speed",
        "Calibration",
        "Other results",
        "Perplexity of smollm2",
        "Needles found",
    ):
        assert words in page.text
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 2 * 12  # each figure for wide and for narrow windows


def test_the_page_opens_with_comparisons_and_the_rest_folds(page, text):
    before_articles = page.text[: page.text.index("Perplexity of smollm2")]
    for words in (
        "smollm2, 3 windows, full attention’s loss 3.100: gap by token budget, nats per token ± one standard error",
        "tidal, shipped +0.220 ± 0.012 +0.055 ± 0.003 –",
        "smollm2, batch 1: whole step, NVIDIA H200 tidal 128 2.50× 3.2 ms, reads 10 % 2.50× 3.2 ms, reads 10 %",
        "2 KV heads, batch 1: attention alone, NVIDIA H200 tidal 64 2.50× 0.016 ms, reads",
        "measured on NVIDIA H200.",
    ):
        assert words in before_articles
    assert "<details open" not in text and page.tags.count("h3") == 12
    for numbers in ("searched +0.030", "held out +0.040", "tidal, shipped 64 – 9/12 9/12 18/24"):
        assert numbers in page.text


def test_tables_hold_the_numbers(page):
    assert "method 64 256 50 % tidal, shipped +0.220 ± 0.012 +0.055 ± 0.003 –" in page.text
    assert "full – 100 % 12/12 12/12 24/24" in page.text
    assert "qa f1 20 0.5 ± 0.1 0.5 ± 0.1 qa loss 20 3 3" in page.text
    assert "tidal 128 10 % 3.200 1.000 2.50×" in page.text
    assert "tidaldecode eval ppl --seed 7" in page.text and "torch 2.11.0" in page.text
    assert "generate full 48 paper 1" in page.text
    assert "plain shipped 64 – – +0.300 ± 0.100 1.00 2.00× – –" in page.text
    assert "lossless shipped 64 – 8 +0.000 1.00 2.00× 7.50 1" in page.text
    assert "Coherence of smollm2" in page.text and "Recall over distance" in page.text
    assert "quest 64 20 % +0.250 ± 0.000 1.20× 25.0 ± 0.0 % 2 50.0 ± 0.0 % 12.5 ± 0.0 %" in page.text


def test_answers_are_read_side_by_side(page):
    for words in (
        "one (who says): Who <b>? reference Ahab full full says <i>one full, another seed, +0.125 full says <i>one",
        "quest, 64, +0.250, loops quest says <i>one two (who says): Who <b>?",
    ):
        assert words in page.text


def test_nothing_is_loaded(text, page):
    links = [value for value in page.loads if not value.startswith("data:")]
    assert links and all(value.startswith("#") for value in links)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert "@import" not in text and "@font-face" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))
    ids = set(page.ids)
    assert {value[1:] for value in links} | set(re.findall(r"url\(#(.*?)\)", text)) <= ids


def test_figures_follow_the_theme(text):
    assert "prefers-color-scheme: dark" in text
    dark = resources.files("tidaldecode.report").joinpath("page.css").read_text().split("prefers-color-scheme: dark")[1]
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    for name, color in drawing.COLORS.items():
        assert re.search(rf"--{name}: #\w{{6}};", dark), name
        assert color not in figures
    for name in ("ink", "muted", "grid", "paper", "blue", "teal", "magenta"):
        assert f"var(--{name})" in figures
    assert not re.search(r"fill: #000000|font-family: 'DejaVu", figures)


def test_names_are_text_and_never_markup(tmp_path):
    (tmp_path / "results").mkdir()
    folder = fill(tmp_path / "results", HOSTILE)
    rows = [row | {"plan": row["plan"] and HOSTILE} for row in PPL]
    write_cells(folder / "a.jsonl", "ppl", ("window", "method", "plan", "budget"), rows, HOSTILE)
    (folder / "<b>&.json").write_text(json.dumps({"versions": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE, "device": HOSTILE}))
    (folder / "<script>.json").write_text("no")
    report = write_report(folder, tmp_path / "report.html")
    text = report.output.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "b" not in page.tags
    assert "<script" not in text.lower()
    assert HOSTILE in page.text
    assert "<script>.json" in [skipped.file for skipped in report.skipped]


def test_foreign_files_are_left_out_and_said(run, bare, tmp_path):
    deep = "[" * 100_000
    broken_row = DECODE | {"rows": [*DECODE["rows"], {"method": "tidal"}]}
    infinite = DECODE | {"rows": [DECODE["rows"][0] | {"step_ms": float("inf")}]}
    uneven = [PPL[0], PPL[1] | {"nll_by_position": [1.0]}]
    write_cells(bare / "other-windows.jsonl", "ppl", ("window", "method", "plan", "budget"), uneven)
    write_cells(bare / "none-yet.jsonl", "ppl", ("window",), [])
    write_cells(bare / "another-kind.jsonl", "magic", ("window",), [{"window": 1}])
    foreign = {
        "list.json": ("[1, 2]", "no JSON object"),
        "text.json": ("no", "no JSON"),
        "bytes.json": (b"\xff\xfe{}", "no JSON"),
        "deep.json": (deep, "recursion"),
        "half.json": ('{"versions": {}, "text": "\\ud800"}', "surrogates"),
        "package.json": ('{"name": "x"}', "no results of tidaldecode"),
        "broken.json": (json.dumps(broken_row), "rows lack"),
        "infinite.json": (json.dumps(infinite), "finite"),
        "matrix.json": ('{"recall": [[1, 0], [1]]}', "square"),
        "matrices.json": ('{"recall": [[1]], "recalls": {"unified": [[1, 0]]}}', "square"),
        "samples.jsonl": ('{"doc_id": 0}\n', "no cells"),
    }
    for name, (content, _) in foreign.items():
        (bare / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = run("report", str(bare), "--output", str(tmp_path / "report.html"), "--json")
    answer = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert answer["figures"] == [] and answer["output"] == str(tmp_path / "report.html")
    reasons = {skipped["file"]: skipped["reason"] for skipped in answer["skipped"]}
    assert reasons.keys() == foreign.keys() | {"other-windows.jsonl", "none-yet.jsonl", "another-kind.jsonl"}
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    first = [f"left out {file}: {reason}" for file, reason in list(reasons.items())[:5]]
    assert err.splitlines()[:6] == [*first, f"and {len(reasons) - 5} more: the page lists them"]
    assert "left out" not in "".join(err.splitlines()[6:])
    for file, reason in reasons.items():
        assert file in text and "\n" not in reason
    for file, (_, words) in foreign.items():
        if file != "broken.json":
            assert words in reasons[file], file
    assert "6.context" in reasons["broken.json"]
    assert "different lengths" in reasons["other-windows.jsonl"]
    assert "magic" in reasons["another-kind.jsonl"]


def test_plans_of_one_name_are_told_apart(bare, tmp_path):
    rows = [
        ppl_cell(window, "tidal", 64, gap, "mine.json") | {"plan_digest": digest}
        for window in (0, 1)
        for gap, digest in ((0.25, "0123456789"), (0.75, "abcdef0123"))
    ]
    write_cells(bare / "ppl.jsonl", "ppl", ("window", "plan_digest"), rows)
    text = Page(write_report(bare, tmp_path / "report.html").output.read_text(encoding="utf-8")).text
    assert "tidal, mine.json (012345) +0.250 ± 0.000 tidal, mine.json (abcdef) +0.750 ± 0.000" in text


def test_odd_operations_and_calibrations_are_no_traceback(bare, tmp_path):
    """An operation without a name, a floor of 0; a share that is text is said."""
    rows = [row | {"floor_us": 0.0} for row in OPERATIONS["rows"]]
    (bare / "ops.json").write_text(json.dumps(OPERATIONS | {"rows": [*rows, rows[0] | {"operation": ""}]}))
    (bare / "plan.json").write_text('{"calibration_gap": 0.5, "heldout_gap": null, "kv_read_fraction": "all"}')
    report = write_report(bare, tmp_path / "report.html")
    assert [(one.file, one.reason.split(":")[0]) for one in report.skipped] == [
        ("plan.json", "not as expected at kv_read_fraction")
    ]
    assert "step tidal 64 – 16.0 0.0" in Page(report.output.read_text(encoding="utf-8")).text


def test_what_a_stopped_run_left_is_shown(bare, tmp_path, caplog):
    path = bare / "needle.jsonl"
    write_cells(path, "needle", ("length", "depth", "method"), NEEDLES)
    path.write_text(path.read_text()[:-20])
    report = write_report(bare, tmp_path / "report.html")
    assert report.skipped == [] and "is damaged and skipped" in caplog.text
    text = Page(report.output.read_text(encoding="utf-8")).text  # the last cell was Quest's
    note = "Left out: 1 case of 6 that not every method and budget has."
    assert f"1 is every needle, 0 none. {note}" in text
    assert "full – 100 % 12/12 8/8 20/20" in text and "quest 64 – 3/12 2/8 5/20" in text


def test_methods_are_compared_on_the_windows_that_all_have(bare, tmp_path):
    """TidalDecode at 64 was run on one hard window more: its gap there is in no average."""
    rows = [*PPL, ppl_cell(9, "full", None, 0.0), ppl_cell(9, "tidal", 64, 5.0, "shipped")]
    write_cells(bare / "ppl.jsonl", "ppl", ("window", "method", "plan", "budget"), rows)
    text = Page(write_report(bare, tmp_path / "report.html").output.read_text(encoding="utf-8")).text
    note = "Left out: 1 window of 4 that not every method and budget has."
    assert "tidal, shipped +0.220 ± 0.012 +0.055 ± 0.003 –" in text and "†" not in text
    assert (
        f"3 windows, full attention’s loss 3.100: gap by token budget, nats per token ± one standard error. {note}"
        in text
    )
    assert f"bars are one standard error over windows. {note}" in text


def test_methods_that_share_no_window_are_marked(bare, tmp_path):
    rows = [ppl_cell(window, "full", None, 0.0) for window in (0, 1, 2)]
    rows += [ppl_cell(window, "tidal", 64, 0.25, "shipped") for window in (0, 1)]
    rows += [ppl_cell(0, "tidal", 128, 0.25, "shipped"), ppl_cell(2, "streaming", 64, 0.5)]
    write_cells(bare / "ppl.jsonl", "ppl", ("window", "method", "plan", "budget"), rows)
    lengths = {"full": (200, 400), "tidal": (200,), "quest": (400,)}
    needles = [row for row in NEEDLES if row["length"] in lengths[row["method"]]]
    write_cells(bare / "needle.jsonl", "needle", ("length", "depth", "method"), needles)
    text = Page(write_report(bare, tmp_path / "report.html").output.read_text(encoding="utf-8")).text
    assert "± one standard error; † over fewer than all 3 windows. No window is common" in text
    assert "tidal, shipped +0.250 ± 0.000 † +0.250 † streaming +0.500 † –" in text
    note = "is common to all methods and budgets: they can’t be compared; † marks fewer than all."
    assert "smollm2, 1 to 3 windows: gap by token budget" in text and f"No window {note}" in text
    assert f"No case {note}" in text and "tidal, shipped 64 – 9/12 – 9/12 † quest 64 – – 3/12 3/12 †" in text
    assert "Needles found; † of fewer than all 24" in text


def test_a_folder_of_one_file(tmp_path):
    """Full attention alone, and one window: no gap, no standard error, no speed-up."""
    (tmp_path / "results").mkdir()
    write_cells(tmp_path / "results" / "ppl.jsonl", "ppl", ("window", "method"), PPL[:1])
    (tmp_path / "results" / "decode.json").write_text(
        json.dumps(DECODE | {"rows": [DECODE["rows"][1] | {"speedup_vs_full": None}]})
    )
    report = write_report(tmp_path / "results", tmp_path / "report.html")
    assert [figure["id"] for figure in report.figures] == ["r2-perplexity-over-position", "r1-step-times"]
    page = Page(report.output.read_text(encoding="utf-8"))
    assert page.open == [] and "At a glance" not in page.text


def test_a_byte_order_mark_is_no_part_of_results(tmp_path):
    (tmp_path / "decode.json").write_bytes(codecs.BOM_UTF8 + json.dumps(DECODE).encode())
    results, skipped = read_results(tmp_path)
    assert [result.kind for result in results] == ["decode"] and skipped == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], ["missing is no folder", "give the folder of results"]),
        (["empty"], ["empty has no results (.json, .jsonl)"]),
        (["foreign"], ["foreign has nothing that is understood", "x.json: no JSON"]),
        (["bare", "--output", "nowhere/report.html"], ["--output nowhere/report.html", "nowhere does not exist"]),
        (["bare", "--output", "empty"], ["--output empty is a folder", "report.html"]),
        ([], ["RESULTS_DIR"]),
    ],
)
def test_bad_input(run, bare, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.json").write_text("no")
    before = sorted(tmp_path.rglob("*"))
    assert_one_line(run("report", *arguments), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_matplotlib(run, bare, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_one_line(run("report", str(bare)), "plots need matplotlib: pip install 'tidaldecode[plot]'")


def test_an_older_page_stays_whole(bare, tmp_path, monkeypatch):
    output = tmp_path / "report.html"
    output.write_text("older")

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tidaldecode.whole_file.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(bare, output)
    assert output.read_text() == "older" and sorted(tmp_path.iterdir()) == [bare, output]


def test_a_full_disk_is_one_line(run, bare, tmp_path, monkeypatch):
    """Half of the page is written, then there is no space left: the half is removed."""
    write = Path.write_text

    def fill_disk(path, text, **encoding):
        write(path, text[: len(text) // 2], **encoding)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fill_disk)
    output = tmp_path / "report.html"
    assert_one_line(run("report", str(bare), "--output", str(output)), f"{output} can't be written: No space left")
    assert list(tmp_path.iterdir()) == [bare]


def test_a_figure_that_cant_be_written_is_one_line(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match=r"a\.png can't be written: "):
        save_png(scores.needle_heatmaps, needle_summary(NEEDLES), tmp_path / "a.png", "a")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_results_of_this_repository_are_understood_and_shown_once():
    folder = Path(__file__).parent.parent / "benchmarks" / "results"
    results, skipped = read_results(folder)
    assert skipped == []
    kinds = {result.file: result.kind for result in results}
    assert kinds["decode_llama-2-7b_h200.json"] == "decode" and kinds["ops_h200.json"] == "ops"
    shown = [file for file, kind in kinds.items() if kind in ("ppl", "needle") or file.endswith("correction.jsonl")]
    assert shown == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jsonl"))
    assert not any("needle" in file or "ppl" in file for file, kind in kinds.items() if kind == "other")


def test_shares_of_k_and_v_stand_beside_budgets_where_they_are_known(tmp_path):
    """As methods count them, by the plan that lies in the folder; a plan that does not is said to be left out."""
    plan = read_plan("smollm2-135m").model_copy(update={"sink_tokens": 3, "name": "mine"})
    (tmp_path / "results").mkdir()
    plan.save(tmp_path / "results" / "plan.json")
    methods = [
        Method.named("tidal", 64, plan), Method.named("quest", 64), Method.named("streaming", 64),
        Method.named("oracle", 64, selection="unified", full_layers=2),
        Method.named("tidal", 64, read_plan("smollm2-135m-paper")),
    ]  # fmt: skip
    rows = [ppl_cell(window, "full", None, 0.0) | Method.named("full").key() for window in (0, 1)]
    rows += [ppl_cell(window, "tidal", 64, 0.1) | method.key() for window in (0, 1) for method in methods]
    for row in (rows[6], rows[11]):
        row |= {"plan": "lost", "plan_digest": "0"}
    identity = {"kind": "ppl", "model": "x", "context": 128}
    shape = ModelShape(num_layers=30, num_query_heads=9, num_kv_heads=3, head_dim=64)
    header = identity | {"model_shape": shape.describe()}
    with Cells.open(tmp_path / "results" / "ppl.jsonl", header, ("window", *METHOD_KEY), ENVIRONMENT) as cells:
        for row in rows:
            cells.append(row)
    report = write_report(tmp_path / "results", tmp_path / "report.html")
    assert report.skipped == [] and report.figures[0]["id"] == "opening-loss-over-share"
    text = Page(report.output.read_text(encoding="utf-8")).text
    for method in methods[:4]:
        share = method.attention(shape, 128).kv_read_fraction(128)
        label = MethodSettings.of(method.key()).label
        assert f"{label} +0.100 ± 0.000 reads {100 * share:.3g} %" in text
    assert "Not drawn, as the folder does not have the plan or shape that says what they read: tidal, lost." in text
    assert "tidal, lost +0.100 ± 0.000 quest" in text


def test_a_row_says_itself_what_it_reads(tmp_path):
    """Of a plan that is nowhere to be found; the oracle, the floor, is drawn in the same figure, dashed."""
    rows = [row | {"kv_read_fraction": 1.0 if row["budget"] is None else row["budget"] / 512} for row in PPL]
    rows = [row | {"method": "oracle"} if row["method"] == "streaming" else row for row in rows]
    write_cells(tmp_path / "ppl.jsonl", "ppl", ("window", "method", "plan", "budget"), rows)
    opening = overview.losses(read_results(tmp_path)[0], SharesRead([]))
    assert opening.tables[0].rows[0]["64"] == "+0.220 ± 0.012\nreads 12.5\N{NO-BREAK SPACE}%"
    assert "Not drawn" not in opening.figures[0].description
    shares = compared(read_results(tmp_path)[0], SharesRead([])).shares
    figure = losses.loss_over_share({"": {summary: share for summary, share in shares.items() if summary.budget}}, 8)
    styles = {bars.get_label(): bars[0].get_linestyle() for bars in figure.axes[0].containers}
    assert styles["oracle"] == "--" and styles["tidal, shipped"] == "-"


def test_shares_of_what_another_version_wrote_are_not_known():
    shares, shape = SharesRead([]), "30 layers, 9 query heads, 3 KV heads, head dim 64"
    result = Result("a", "ppl", {"model_shape": shape}, [], [])
    settings = [
        MethodSettings("oracle", selection="a rule to come"), MethodSettings("a method to come"),
        MethodSettings("quest", page_size=3), MethodSettings("quest", full_layers=10**12), MethodSettings("tidal"),
    ]  # fmt: skip
    assert [shares.of(result, one, 64, 128) for one in settings] == [None] * 5
    streaming = MethodSettings("streaming")
    assert [shares.of(result, streaming, 64, context) for context in (128, 0, None)] == [0.5, None, None]
    for fields, share in (({"model": "SmolLM2_135M"}, 0.5), ({"model_shape": "0" + shape[2:]}, None), ({}, None)):
        assert shares.of(Result("a", "ppl", fields, [], []), streaming, 64, 128) == share


def test_files_of_the_same_windows_are_compared_together(tmp_path):
    """Of what two files hold, the first one's is taken; other windows stay apart."""
    key = ("window", "method", "plan", "budget")
    write_cells(tmp_path / "a" / "ppl.jsonl", "ppl", key, [row for row in PPL if row["method"] != "streaming"])
    again = [row | {"nll": row["nll"] + 9} if row["method"] == "tidal" else row for row in PPL]
    write_cells(tmp_path / "b" / "ppl.jsonl", "ppl", key, again)
    write_cells(tmp_path / "c" / "ppl.jsonl", "ppl", key, [row | {"window": row["window"] + 50} for row in PPL])
    opening = overview.losses(read_results(tmp_path)[0], SharesRead([]))
    (table,) = opening.tables
    assert [row["method"] for row in table.rows] == ["tidal, shipped", "tidal, paper", "streaming"]
    assert table.rows[0]["64"] == "+0.220 ± 0.012" and table.rows[2]["50\N{NO-BREAK SPACE}%"].startswith("+0.330")


def test_plans_of_a_study_are_told_apart():
    cells = [{**cell, "plan": plan} for plan in ("a", "b") for cell in CORRECTION if cell["mode"] != "full"]
    rows = rows_of([cell for cell in CORRECTION if cell["mode"] == "full"] + cells)
    plain = [row for row in rows if row.mode == "plain"]
    assert [row.plan for row in plain] == ["a", "b"]


def printed(rows: list[dict], **fields) -> str:
    """What `--json` prints."""
    return json.dumps({**ENVIRONMENT, "model": "smollm2", "text": "a name", "seconds": 1.5, **fields, "rows": rows})


def write_printed(folder: Path) -> None:
    """The `--json` objects of the cells of `fill`."""
    folder.mkdir(exist_ok=True)
    rows = [row.model_dump() for row in ppl_summary(PPL)]
    (folder / "ppl.json").write_text(printed(rows, context=128, figures=["ppl_budgets.png"]))
    summaries = needle_summary(NEEDLES)
    methods = [{**summary.variant._asdict(), "budget": summary.budget} for summary in summaries]
    (folder / "needle.json").write_text(
        printed(
            [
                {**method, "correct": summary.correct, "total": summary.total, "accuracy": summary.accuracy}
                for method, summary in zip(methods, summaries, strict=True)
            ],
            cells=[
                {**method, **cell._asdict()}
                for method, summary in zip(methods, summaries, strict=True)
                for cell in summary.cells
            ],
            full_accuracy=1.0,
            figure="needle.png",
        )
    )
    (folder / "tasks.json").write_text(printed(TASKS, tasks=["qa"], results={"full": {"qa": {"f1,none": 0.5}}}))


def test_what_json_printed_is_not_shown_beside_its_cells(tmp_path):
    (tmp_path / "results").mkdir()
    folder = fill(tmp_path / "results")
    before, _ = read_results(folder)
    write_printed(folder / "evaluation")
    results, skipped = read_results(folder)
    assert [result.file for result in results] == [result.file for result in before] and skipped == []
    (folder / "evaluation" / "another.json").write_text(
        (folder / "evaluation" / "ppl.json").read_text().replace('"model": "smollm2"', '"model": "llama"')
    )
    assert "evaluation/another.json" in [result.file for result in read_results(folder)[0]]


def test_what_json_printed_is_an_article_as_its_cells_are(tmp_path):
    write_printed(tmp_path / "printed")
    key = ("length", "depth", "method", "plan", "budget")
    write_cells(tmp_path / "cells" / "ppl.jsonl", "ppl", ("window", "method", "plan", "budget"), PPL)
    write_cells(tmp_path / "cells" / "needle.jsonl", "needle", key, NEEDLES)
    write_cells(tmp_path / "cells" / "tasks.jsonl", "lm-eval", ("task", "method", "budget"), TASKS)
    (printed_results, none), (cells_results, _) = (read_results(tmp_path / name) for name in ("printed", "cells"))
    assert none == []
    for mine, theirs in zip(printed_results, cells_results, strict=True):
        article = {"ppl": articles.perplexity, "needle": articles.needles, "lm-eval": articles.tasks}[mine.kind]
        first, second = article(mine, "a", SharesRead([])), article(theirs, "a", SharesRead([]))
        assert first.title == second.title
        assert (first.figures, first.tables) == (second.figures, second.tables)
        assert not {"nll", "full accuracy", "figure"} & first.facts.keys()


def test_what_json_printed_of_corrections_is_an_article_as_its_cells_are(tmp_path):
    """Windows that some ways of decoding lack are left out."""
    write_printed_correction(tmp_path / "printed")
    rest = [cell | {"window": 20} for cell in CORRECTION[:2]]
    key = ("window", "mode", "length", "budget")
    write_cells(tmp_path / "cells" / "correction.jsonl", "correction", key, [*CORRECTION, *rest])
    ((mine,), none), ((theirs,), _) = (read_results(tmp_path / name) for name in ("printed", "cells"))
    assert none == [] and mine.kind == theirs.kind == "correction"
    first, second = (articles.correction(result, "a", SharesRead([])) for result in (mine, theirs))
    assert (first.title, first.figures, first.tables) == (second.title, second.figures, second.tables)
    write_cells(tmp_path / "none" / "correction.jsonl", "correction", key, CORRECTION[:5] + rest)
    write_cells(tmp_path / "none" / "started.jsonl", "correction", key, CORRECTION[1:5])
    results, skipped = read_results(tmp_path / "none")
    assert [result.file for result in results] == ["correction.jsonl"]
    assert [(one.file, one.reason) for one in skipped] == [("started.jsonl", "no window was decoded in every way yet")]


def test_lossless_cells_without_their_counts_are_left_out_and_said(bare):
    key = ("window", "mode", "length", "budget")
    for name, lacking in (("a", {"accepted_per_round": None}), ("b", {"mode": "lossless"})):
        write_cells(
            bare / f"{name}.jsonl", "correction", key, [*CORRECTION, CORRECTION[1 if name == "b" else 4] | lacking]
        )
    results, skipped = read_results(bare)
    assert [result.file for result in results] == ["found.json"]
    assert {one.reason for one in skipped} == {"lossless cells without accepted_per_round or first_difference"}


def test_gaps_below_zero_are_seen_and_their_errors():
    cells = [cell | {"nll": cell["nll"] - 0.5 * (cell["mode"] == "correction")} for cell in CORRECTION]
    rows = rows_of(cells)
    axis = losses.correction_panels(rows, WIDE).axes[0]
    (line,) = (container for container in axis.containers if container.get_label() == "budget 64, correction")
    points, _, (bars,) = line
    assert points.get_ydata().tolist() == pytest.approx([-0.35, 0.3]) and axis.get_ylim()[0] < -0.35
    low, high = bars.get_segments()[1][:, 1]
    assert high - low == pytest.approx(2 * 0.1)


def write_printed_correction(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "correction.json").write_text(printed([row.model_dump() for row in rows_of(CORRECTION)], figure="c.png"))


def test_large_files_are_left_out(bare, monkeypatch):
    monkeypatch.setattr("tidaldecode.report.folder._LARGEST", 10)
    with pytest.raises(InputError, match="nothing that is understood"):
        read_results(bare)


def test_the_sweep_shows_gaps_errors_and_full_attention():
    summaries = ppl_summary(PPL)
    axis = losses.loss_over_budget(summaries, WIDE).axes[0]
    lines = {container.get_label(): container for container in axis.containers}
    assert list(lines) == ["tidal, shipped", "tidal, paper", "streaming"]
    points, caps, (bars,) = lines["tidal, shipped"]
    assert points.get_xdata().tolist() == [64, 256]
    assert points.get_ydata() == pytest.approx([0.22, 0.055])
    low, high = bars.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * summaries[1].gap_stderr) and len(caps) == 2
    assert lines["streaming"][0].get_xdata().tolist() == [64]  # half of 128 tokens
    assert axis.get_xscale() == "log" and axis.get_ylim()[0] <= 0
    assert axis.lines[0].get_label() == "full attention" and set(axis.lines[0].get_ydata()) == {0}


def test_perplexity_over_position_has_a_panel_for_each_budget():
    figure = losses.perplexity_over_position(ppl_summary(PPL), NARROW)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [
        "budget 64 tokens", "budget 256 tokens", "budget 50\N{NO-BREAK SPACE}% of the context"
    ]  # fmt: skip
    assert [line.get_label() for line in shown[1].lines] == ["full", "tidal, shipped"]
    full = shown[1].lines[0].get_xydata()
    assert full[:, 0].tolist() == [104, 120]
    assert full[:, 1] == pytest.approx([2.718281828**3.1, 2.718281828**3.6])


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_heatmaps_have_a_panel_for_each_method_and_full_attention_beside(width):
    figure = scores.needle_heatmaps(needle_summary(NEEDLES), width)
    titles = [axis.get_title(loc="left") or axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles[:2] == ["full\nall tokens", "tidal\nshipped\n64 tokens"]
    assert "quest\n64 tokens" in titles
    tidal = figure.axes[1]
    assert tidal.collections[0].get_array().reshape(3, 2).tolist() == [[0.75, 0.75]] * 3
    assert [text.get_text() for text in tidal.texts] == [".75"] * 6
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["200", "400"]


def test_a_needle_cell_still_to_be_measured_is_empty():
    figure = scores.needle_heatmaps(needle_summary(NEEDLES[:-3]), WIDE)
    assert len(figure.axes[0].texts) == 5


def test_task_scores_have_a_panel_for_each_metric():
    shown = [score for score in lm_eval_summary(TASKS) if score.metric != "loss"]
    assert [(score.value, score.stderr) for score in lm_eval_summary(TASKS)][:2] == [(0.5, 0.1), (3, None)]
    figure = scores.task_scores(shown, WIDE)
    assert [axis.get_xlabel() for axis in figure.axes] == ["f1", "acc"]
    assert [container.get_label() for container in figure.axes[0].containers] == ["full", "streaming, 64"]


def test_speed_ups_have_a_panel_for_each_shape_and_batch():
    rows = [row | {"what": "whole step"} for row in DECODE["rows"] if row["budget"] is not None]
    figure = speeds.speed_ups([("one", rows), ("another", [rows[0]])], WIDE)
    assert [axis.get_title() for axis in figure.axes] == ["one", "another"]
    full, *lines = figure.axes[0].lines
    assert set(full.get_ydata()) == {1}
    assert [line.get_label() for line in lines] == ["tidal, 64", "tidal, 128"]
    assert lines[1].get_xydata().tolist() == [[1024, 2.5], [4096, 2.5]]
    assert lines[0].get_color() == lines[1].get_color() and lines[0].get_linestyle() != lines[1].get_linestyle()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1K", "4K"]


def test_png_files(tmp_path):
    save_png(losses.loss_over_budget, ppl_summary(PPL), tmp_path / "a.png", HOSTILE)
    save_png(losses.perplexity_over_position, ppl_summary(PPL), tmp_path / "b.png", "b")
    save_png(scores.needle_heatmaps, needle_summary(NEEDLES), tmp_path / "c.png", "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in tmp_path.iterdir())


def test_full_attention_alone_has_no_sweep(tmp_path):
    full = [summary for summary in ppl_summary(PPL) if summary.budget is None]
    path = tmp_path / "a.png"
    assert not save_png(losses.loss_over_budget, full, path, "a") and not path.exists()
    assert not save_png(losses.perplexity_over_position, [], path, "a") and not path.exists()
    assert not save_png(scores.needle_heatmaps, [], path, "a") and not path.exists()
    assert save_png(losses.perplexity_over_position, full, path, "a") and path.exists()
    found = needle_summary(row for row in NEEDLES if row["method"] == "full")
    assert save_png(scores.needle_heatmaps, found, tmp_path / "b.png", "b")


def test_methods_keep_their_colours_and_plans_differ():
    alone, beside = drawing.line_styles(["tidal"]), drawing.line_styles(["full", "tidal", "tidal", "tidal", "new"])
    assert alone[0].color == beside[1].color
    assert len({style.color for style in beside}) == len({style.marker for style in beside}) == 5
    many = drawing.line_styles(["full", *["tidal"] * 5, "quest", "streaming", "oracle", "oracle"])
    assert len({style.color for style in many}) == len({style.marker for style in many}) == 10


def test_long_titles_of_panels_do_not_meet():
    cells = [
        needle_cell(length, 0.5, method, budget, 1, plan and "smollm2-135m-medium")
        for length in (4000, 7600)
        for method, budget, plan in [("full", None, None), *(("tidal", budget, "p") for budget in (1, 2, 3, 4, 5))]
    ]
    figure = scores.needle_heatmaps(needle_summary(cells), WIDE)
    figure.draw_without_rendering()
    assert len(figure.axes) == 6
    for axis in figure.axes:
        assert max(title.get_window_extent().x1 for title in (axis.title, axis._left_title)) <= axis.bbox.x1


def test_needles_are_told_method_by_method(bare):
    rows = [
        needle_cell(200, 0.5, "tidal", budget, correct, plan)
        for budget, correct in ((64, 1), (128, 3))
        for plan in ("shipped", "paper")
    ]
    write_cells(bare / "needle.jsonl", "needle", ("length", "depth", "plan", "budget"), rows)
    results = [result for result in read_results(bare)[0] if result.kind == "needle"]
    (table,) = articles.needles(results[0], "a", SharesRead([])).tables
    assert [(row["method"], row["budget"]) for row in table.rows] == [
        (f"tidal, {plan}", budget) for plan in ("shipped", "paper") for budget in ("64", "128")
    ]


def test_numbers_are_set_flush_right():
    rows = (("1", "1,024", "+0.1 ± 0.2", "–", "text", "3 of"), ("2", "−0.5", ".5", "2.50×", "1", "x"))
    columns = Table("", [dict(zip("abcdef", row, strict=True)) for row in rows]).columns
    assert list(columns) == list("abcdef") and list(columns.values()) == [False, True, True, True, False, False]
