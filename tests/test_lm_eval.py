"""`eval lm-eval`: full attention's scores are lm-eval's own, what other methods decode, resumed runs, and bad input."""

from __future__ import annotations

import io
import json
import logging

import pytest
import torch
from rich.console import Console

from command_line import assert_one_line
from families import plan_for
from tidaldecode import InputError, TidalCache, TidalPlan, apply
from tidaldecode.cli.eval_lm_eval import print_tasks
from tidaldecode.evaluate.study import Report, measure, quiet
from tidaldecode.evaluate.task_files import find_tasks, load_tasks
from tidaldecode.evaluate.task_settings import TaskSettings
from tidaldecode.evaluate.tasks import tasks
from tidaldecode.methods.method import Method
from tidaldecode.models import model_shape
from tidaldecode.results.cells import Cells, read_cells

pytest.importorskip("lm_eval")  # the tests of everything else run without it

ANSWERS = ("ham", "cheese", "a hat")

QA = """
task: qa
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}\\n\\nQuestion: {{{{input}}}}\\nAnswer:"
doc_to_target: "{{{{answers[0]}}}}"
generation_kwargs: {{max_gen_toks: {tokens}, do_sample: false, until: ["\\n"]}}
process_results: !function own.said
metric_list: [{{metric: said, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
OWN = """
def said(doc, results):
    return {"said": float(sum(results[0].encode()))}
"""
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}\\n\\nQuestion: {{{{input}}}}\\nAnswer:"
doc_to_target: "{{{{all_classes.index(answers[0])}}}}"
doc_to_choice: "{{{{all_classes}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
BOTH = """
group: both
task: [qa, choice]
aggregate_metric_list: [{metric: acc, weight_by_size: false}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Task files over a file in LongBench's format; one document is longer than the tiny model's 512 positions."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_documents(folder, ANSWERS)
    for name, text in (("qa", QA), ("choice", CHOICE), ("rolling", ROLLING)):
        write_task(folder, name, text)
    (folder / "both.yaml").write_text(BOTH)
    (folder / "own.py").write_text(OWN)
    return folder


def write_documents(folder, answers):
    documents = [
        {
            "input": f"What does number {number} have?", "context": f"Number {number} has {answer}. " * 10 * number,
            "answers": [answer], "length": 50, "dataset": "qa", "language": "en", "all_classes": list(ANSWERS),
            "_id": str(number),
        }
        for number, answer in enumerate(answers, start=1)
    ]  # fmt: skip
    (folder / "qa.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))


def write_task(folder, name, text, tokens=7):
    (folder / f"{name}.yaml").write_text(text.format(data=folder / "qa.jsonl", tokens=tokens))


@pytest.fixture
def llama(tiny):
    return apply(tiny("llama"), "full")


@pytest.fixture
def lm(llama, byte_tokenizer):
    from tidaldecode.evaluate.lm_eval_model import MethodLM

    return MethodLM(llama, byte_tokenizer)


@pytest.fixture
def own(tiny, byte_tokenizer):
    """lm-eval's model, as it comes."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=tiny("llama"), tokenizer=byte_tokenizer, batch_size=1)


def loaded_tasks(folder, llama, *names, **options):
    settings = TaskSettings(names, folder, **options)
    return load_tasks(*find_tasks(settings), settings, llama.config, None), settings


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, entry, index) for index, entry in enumerate(arguments)]


def evaluate_tasks(model, tokenizer, loaded, settings, methods, cells=None, on_progress=quiet):
    return measure(tasks(tokenizer, loaded, settings, methods), model, cells, on_progress)


def results_by_method(rows, methods, loaded, settings):
    """Of a single method, too, by its label."""
    results = tasks(None, loaded, settings, methods).to_json(rows)["results"]
    return {methods[0].label: results} if len(methods) == 1 else results


def tidal(model, budget=12):
    return Method.named("tidal", budget, plan_for(model.config, "unified").model_copy(update={"name": "p"}))


# ---- the model


def generate_requests():
    options = {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}
    long = "Twice upon a time " * 40  # longer than the model's positions: its end is read
    other = {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 1}
    return instances("generate_until", ("Once upon a time", options), (long, options), ("x", other))


def pair_requests():
    long = "Twice upon a time " * 40
    pairs = (("One and two", " are three"), ("One and two", " are"), ("", "from nothing"), (long, " ends"), ("x ", "y"))
    return instances("loglikelihood", *pairs)


def test_full_attention_is_lm_evals_own_model(lm, own):
    assert lm.generate_until(generate_requests()) == own.generate_until(generate_requests())
    for (score, greedy), (expected, also) in zip(
        lm.loglikelihood(pair_requests()), own.loglikelihood(pair_requests()), strict=True
    ):
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == also
    texts = instances("loglikelihood_rolling", ("A short text.",), ("A text of several windows. " * 45,))
    assert lm.loglikelihood_rolling(texts) == pytest.approx(own.loglikelihood_rolling(texts), abs=1e-2)


@pytest.mark.parametrize("budget", [12, 0.1])
def test_answers_are_decoded_under_the_method(lm, llama, byte_tokenizer, own, budget):
    """The prompt's last token too; and a cache that held longer prompts before is no other than a new one."""
    lm.method = tidal(llama, budget)
    (request,) = instances("generate_until", ("Once upon a time " * 9, {"until": [], "max_gen_toks": 9}))
    lm.generate_until(generate_requests())
    (said,) = lm.generate_until([request])
    ids = byte_tokenizer(request.args[0], return_tensors="pt")["input_ids"]
    cache = TidalCache(llama.config, llama._tidaldecode.plan, ids.shape[1] + 9)
    llama(ids[:, :-1], past_key_values=cache)
    cache.attention = lm.method.attention(model_shape(llama.config), ids.shape[1])
    output = llama.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert said == byte_tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert said != own.generate_until([request])[0]


def test_continuations_are_decoded_under_the_method(lm, llama, byte_tokenizer):
    lm.method = tidal(llama)
    question, first, second = "Once upon a time " * 4, " there was", " nothing at all"
    found = lm.loglikelihood(instances("loglikelihood", (question, first), (question, second), ("", first)))
    prompts = [byte_tokenizer(question)["input_ids"]] * 2 + [[lm.prefix_token_id]]
    for (score, _), prompt, answer in zip(found, prompts, (first, second, first), strict=True):
        if prompt[-1] == byte_tokenizer(" ")["input_ids"][0]:  # lm-eval gives the last blank to the continuation
            prompt, answer = prompt[:-1], " " + answer
        ids = torch.tensor([prompt + byte_tokenizer(answer)["input_ids"]])
        cache = TidalCache(llama.config, llama._tidaldecode.plan, ids.shape[1])
        if len(prompt) > 1:
            llama(ids[:, : len(prompt) - 1], past_key_values=cache)
        cache.attention = lm.method.attention(model_shape(llama.config), ids.shape[1])
        expected = 0.0
        for position in range(len(prompt) - 1, ids.shape[1] - 1):
            logits = llama(ids[:, position : position + 1], past_key_values=cache).logits[0, -1]
            expected += logits.log_softmax(-1)[ids[0, position + 1]].item()
        assert score == pytest.approx(expected, abs=1e-3)


def test_fractions_of_short_prompts(lm, llama):
    """A tenth of ten tokens is one; a plan with sinks takes the least that it can do with."""
    plan = plan_for(llama.config, "unified", sink_tokens=4, recent_tokens=0.25).model_copy(update={"name": "p"})
    for method in (Method.named("tidal", 0.1, plan), Method.named("streaming", 0.1), Method.named("quest", 0.1)):
        lm.method = method
        assert len(lm.generate_until(generate_requests()[-1:])) == 1
        assert lm.loglikelihood(instances("loglikelihood", ("ab", "c")))[0][0] < 0


def test_a_continuation_beyond_the_positions_is_refused(lm):
    with pytest.raises(InputError, match="a continuation of 513 tokens is beyond the model's 512 positions"):
        lm.loglikelihood(instances("loglikelihood", ("a", "b" * 513)))
    assert lm.loglikelihood(instances("loglikelihood", ("a", "b" * 512)))[0][0] < 0


def test_requests_that_are_cut_and_requests_that_are_done_are_counted(lm):
    """A text of several windows is one request, done when its last window is."""
    done = []
    lm.on_request = lambda *request: done.append(request)
    texts = instances("loglikelihood_rolling", ("A text of several windows. " * 45,), ("A short text.",))
    lm.loglikelihood_rolling(texts)
    assert done == [(1, 2), (2, 2)] and lm.truncated == 0
    lm.generate_until(generate_requests())
    assert done[2:] == [(1, 3), (2, 3), (3, 3)] and lm.truncated == 1
    lm.loglikelihood(pair_requests())
    assert len(done) == 10 and lm.truncated == 2


# ---- tasks


def test_scores_of_full_attention_are_lm_evals_own(folder, llama, own, byte_tokenizer):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ("qa", "choice", "rolling")
    loaded, settings = loaded_tasks(folder, llama, *names)
    methods = [Method.named("full"), tidal(llama)]
    rows = evaluate_tasks(llama, byte_tokenizer, loaded, settings, methods)
    assert [(row["task"], row["method"], row["samples"]) for row in rows] == [
        (name, method, 3) for name in names for method in ("full", "tidal")
    ]
    results = results_by_method(rows, methods, loaded, settings)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = simple_evaluate(own, tasks=list(names), task_manager=manager)["results"]
    assert results["full"].keys() == expected.keys()
    for name in names:
        assert numbers(results["full"][name]) == pytest.approx(numbers(expected[name]), rel=1e-4, abs=1e-9), name
    for name, metric in (("qa", "said,none"), ("rolling", "bits_per_byte,none")):
        assert results["tidal p 12"][name][metric] != results["full"][name][metric]


def numbers(metrics):
    """Without the name and the standard errors that lm-eval has not."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


def test_groups_limits_and_examples(folder, llama, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))  # as if lm-eval had these alone
    loaded, settings = loaded_tasks(folder, llama, "both", limit=2, num_fewshot=1)
    assert list(loaded.tasks) == ["qa", "choice"] and list(loaded.groups[None]) == ["both"]
    methods, progress = [Method.named("full")], []
    rows = evaluate_tasks(
        llama, byte_tokenizer, loaded, settings, methods, on_progress=lambda *what: progress.append(what)
    )
    assert [row["samples"] for row in rows] == [2, 2]
    results = results_by_method(rows, methods, loaded, settings)["full"]
    assert results["both"]["acc,none"] == results["choice"]["acc,none"]
    assert [done for done, _, _ in progress] == sorted(done for done, _, _ in progress)
    assert progress[0] == (0, 4, "qa: full") and progress[-1] == (4, 4, "done")
    assert (2, 4, "choice: full") in progress
    none, _ = loaded_tasks(folder, llama, "both", limit=2)
    assert none.tasks["qa"].task.get_config("num_fewshot") == 0
    assert none.tasks["qa"].digest != loaded.tasks["qa"].digest


def test_what_lm_eval_would_warn_of_is_in_the_cells(folder, llama, byte_tokenizer, caplog):
    """One document is longer than the positions; of `choice` there are three requests with it."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    loaded, settings = loaded_tasks(folder, llama, "qa", "choice", "rolling")
    rows = evaluate_tasks(llama, byte_tokenizer, loaded, settings, [Method.named("full")])
    assert [row["truncated"] for row in rows] == [1, 3, 0]
    assert [record for record in caplog.records if record.name.startswith("lm_eval")] == []
    assert logger.level == level


def test_a_metric_that_fails(folder, llama, byte_tokenizer):
    (folder / "own.py").write_text("def said(doc, results):\n    return {'said': {}[\"no\\nkey\"]}\n")
    loaded, settings = loaded_tasks(folder, llama, "choice", "qa", limit=1)
    cells = Cells(tasks(byte_tokenizer, loaded, settings, ()).key)
    with pytest.raises(InputError, match=r"task 'qa' by full failed: .*no.*key") as caught:
        evaluate_tasks(llama, byte_tokenizer, loaded, settings, [Method.named("full")], cells)
    assert "\n" not in str(caught.value) and [row["task"] for row in cells.rows] == ["choice"]


def test_a_metric_that_is_not_finite(folder, llama, byte_tokenizer, monkeypatch):
    """It is null, and so is what a group makes of it."""
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    (folder / "own.py").write_text("def said(doc, results):\n    return {'said': float('inf')}\n")
    (folder / "both.yaml").write_text(BOTH.replace("metric: acc,", "metric: said,"))
    loaded, settings = loaded_tasks(folder, llama, "both", limit=2)
    rows = evaluate_tasks(llama, byte_tokenizer, loaded, settings, [Method.named("full")])
    results = results_by_method(rows, [Method.named("full")], loaded, settings)["full"]
    assert results["qa"]["said,none"] is results["both"]["said,none"] is None
    assert results["both"]["sample_len"] == 4
    json.dumps(results, allow_nan=False)


def test_a_task_without_documents(folder, llama, monkeypatch):
    (folder / "own.py").write_text(OWN + "\ndef none(documents):\n    return documents.select([])\n")
    write_task(folder, "empty", QA.replace("task: qa", "task: empty\nprocess_docs: !function own.none"))
    with pytest.raises(InputError, match="task 'empty' can't be loaded, as one without documents: "):
        loaded_tasks(folder, llama, "empty")
    monkeypatch.setattr("lm_eval.api.task.Task.doc_iterator", lambda *arguments, **options: iter(()))
    with pytest.raises(InputError, match="task 'qa' has no documents"):  # a task of Python code may load without
        loaded_tasks(folder, llama, "qa")


def test_a_stopped_run_goes_on(folder, llama, byte_tokenizer, tmp_path, monkeypatch):
    from lm_eval import evaluator

    original, ran, stop = evaluator.evaluate, [], 1

    def run(lm, **options):
        if len(ran) == stop:
            raise KeyboardInterrupt
        ran.append(lm.method.name)
        return original(lm=lm, **options)

    methods, path = [Method.named("full"), Method.named("streaming", 12)], tmp_path / "lm-eval.jsonl"

    def go_on():
        loaded, settings = loaded_tasks(folder, llama, "choice")
        with Cells.open(path, {"kind": "lm-eval"}, tasks(None, loaded, settings, ()).key) as cells:
            return evaluate_tasks(llama, byte_tokenizer, loaded, settings, methods, cells)

    monkeypatch.setattr(evaluator, "evaluate", run)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert [row["method"] for row in read_cells(path).rows] == ["full"]
    stop = None
    rows = go_on()
    assert len(ran) == 2 and go_on() == rows and len(ran) == 2
    write_documents(folder, ANSWERS[::-1])  # the same task by name, and other documents
    changed = go_on()
    assert len(ran) == 4 and [row["task_digest"] for row in changed] != [row["task_digest"] for row in rows]
    assert len(read_cells(path).rows) == 2


# ---- the command


@pytest.fixture
def command(tiny_folder, folder):
    """A run that takes a second."""
    return [
        "eval", "lm-eval", "--model", str(tiny_folder), "--include-path", str(folder), "--tasks", "choice",
        "--plan", "paper", "--limit", "2",
    ]  # fmt: skip


def test_eval_lm_eval(run, command, tmp_path):
    status, out, err = run(*command, "--method", "full", "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert answer["results"].keys() == {"choice"} and answer["tasks"] == ["choice"] and answer["limit"] == 2
    assert 0 <= answer["results"]["choice"]["acc,none"] <= 1
    output = ["--budget", "16", "--output", str(tmp_path / "results"), "--json"]
    status, out, err = run(*command, *output)
    assert status == 0, err
    several = json.loads(out)
    assert several["results"].keys() == {"full", "tidal paper 16"}
    assert several["results"]["full"] == answer["results"]
    file = read_cells(tmp_path / "results" / "lm-eval.jsonl")
    assert len(file.rows) == 2 and file.header["kind"] == "lm-eval"
    assert file.rows[0]["metrics"].keys() == {f"acc{n}{e},none" for n in ("", "_norm") for e in ("", "_stderr")}
    assert str(tmp_path) not in json.dumps([file.header, file.rows, several])
    assert "did not fit" not in err
    assert_one_line(run(*command, *output, "--limit", "3"), "lm-eval.jsonl", "limit 2", "limit 3")
    status, _, err = run(*command, "--method", "full,streaming", "--budget", "16", "--limit", "3")
    assert status == 0, err
    (line,) = (line for line in err.splitlines() if "did not fit" in line)
    assert line.startswith("choice: 3 requests did not fit the model's positions")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "magic"], ["--method 'magic' is unknown"]),
        (["--include-path", "nowhere"], ["--include-path nowhere is no folder"]),
        (["--metadata", "[1]"], ["--metadata '[1]' is no JSON object"]),
        (["--metadata", "{"], ["--metadata '{' is no JSON object"]),
        (["--apply-chat-template"], ["tokenizer has no chat template"]),
        (["--tasks", "choise"], ["task 'choise' is unknown to lm-eval", "did you mean choice?"]),
        (["--tasks", "no,such"], ["task 'no' is unknown", "`lm-eval ls tasks`"]),
        (["--lengths", "256"], ["--lengths", "RULER's tasks, and none is named"]),
        (["--longbench", "tests"], ["--longbench tests is for LongBench's tasks, and none is named"]),
        (["--tasks", "greedy"], ["'greedy' asks for up to 512 new tokens", "512 positions"]),
        (["--tasks", "beams"], ["'beams' asks for beam search"]),
        (["--tasks", "gone"], ["task 'gone' can't be loaded", "gone.jsonl"]),
    ],
)
def test_bad_input_before_the_model_is_loaded(run, command, options, words, monkeypatch, folder):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    write_task(folder, "greedy", QA.replace("task: qa", "task: greedy"), tokens=512)
    write_task(folder, "beams", QA.replace("task: qa", "task: beams").replace("do_sample", "num_beams: 2, do_sample"))
    write_task(folder, "gone", QA.replace("task: qa", "task: gone").replace("{data}", str(folder / "gone.jsonl")))
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


def test_the_tables_fit_80_columns():
    """Names of LongBench are long, and nothing is cut off."""
    name = "longbench_passage_retrieval_en_e"
    methods = [Method.named("full"), Method.named("quest", 1024), Method.named("oracle", 0.25, selection="per_head")]
    rows = [
        {"task": name, **method.key(), "metrics": {"score,none": 0.5, "score_stderr,none": 0.025, "em,strict": 0.5}}
        | {"samples": 200}
        for method in methods
    ]
    report = Report(None, {"model": "smollm2-135m"}, rows, {})
    console = Console(width=80, file=io.StringIO())
    print_tasks(console, report)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and not [line for line in lines if "\N{HORIZONTAL ELLIPSIS}" in line]
    assert sum(f"smollm2-135m, {name}: " in line for line in lines) == 2
    for method in ("full ", "quest, pages of 16", "oracle, per head"):
        assert sum(line[2:].startswith(method) and "0.5000" in line for line in lines) == 2


def test_without_lm_eval(run, command, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    assert_one_line(run(*command), "lm-eval is not installed: pip install 'tidaldecode[eval]'")


def test_plans_of_one_name_are_never_mixed(folder, llama, byte_tokenizer):
    loaded, settings = loaded_tasks(folder, llama, "choice")
    method = tidal(llama)
    other = Method.named("tidal", 12, method.plan.model_copy(update={"sink_tokens": 2}))
    with pytest.raises(InputError, match="two plans are named 'p'"):
        evaluate_tasks(llama, byte_tokenizer, loaded, settings, [method, other])
