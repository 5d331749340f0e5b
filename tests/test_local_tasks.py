"""RULER's and LongBench's tasks over documents of this machine: no network, whole runs, and bad input."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from command_line import assert_one_line
from families import FAMILIES
from tidaldecode import InputError
from tidaldecode.evaluate import ruler
from tidaldecode.evaluate.task_files import find_tasks, load_tasks
from tidaldecode.evaluate.task_settings import RulerOptions, TaskSettings
from tidaldecode.results.cells import read_cells
from tidaldecode.texts.text import Haystack

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")
pytest.importorskip("jieba")

EXAMPLE = Path(__file__).parents[1] / "examples" / "moby_dick_101-103.txt"
POSITIONS = 1300
MADE = [name for name in ruler.TASKS if not name.startswith("ruler_qa")]


@pytest.fixture(scope="module", autouse=True)
def few_words():
    """Of lm-eval's nine million keys, which take seconds to make, some."""
    import wonderwords

    class Few(wonderwords.RandomWord):
        def __init__(self) -> None:
            super().__init__()
            self._categories = {name: words[:150] for name, words in self._categories.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wonderwords.RandomWord", Few)
        yield
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler.")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing is connected to, and lm-eval's generators are imported anew, as a first run does it."""

    def refuse(*arguments, **options):
        raise AssertionError("a network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("prepare_niah", "niah_utils"):
        monkeypatch.delitem(sys.modules, f"lm_eval.tasks.ruler.{name}", raising=False)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of words, the commonest 250 of the example."""
    pieces = pre_tokenizers.Whitespace().pre_tokenize_str(EXAMPLE.read_text())
    counts: dict[str, int] = {}
    for piece, _ in pieces:
        counts[piece] = counts.get(piece, 0) + 1
    common = sorted(counts, key=lambda piece: -counts[piece])[:250]
    vocabulary = {piece: number for number, piece in enumerate(["<eos>", "<unk>", *common])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, words) -> Path:
    folder = tmp_path_factory.mktemp("of-words")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"](max_position_embeddings=POSITIONS)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def only(monkeypatch):
    """As if lm-eval had the tasks of one folder alone: it takes seconds to list them all."""

    def choose(name):
        folder = Path(lm_eval.__file__).parent / "tasks" / name
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))

    return choose


def loaded(tokenizer, *names, positions=POSITIONS, lengths=(1024,), haystack=EXAMPLE, limit=2, **files):
    settings = TaskSettings(names, ruler=RulerOptions(Haystack(haystack), lengths, **files), limit=limit)
    config = SimpleNamespace(max_position_embeddings=positions)
    return load_tasks(*find_tasks(settings), settings, config, tokenizer)


def documents(found):
    return [document for _, document in found.task.doc_iterator(limit=None)]


# ---- RULER


def test_rulers_tasks_are_made_of_a_text(only, words):
    only("ruler")
    found = loaded(words, "ruler", lengths=(1024, 960))
    assert list(found.tasks) == [f"{name}, {length} tokens" for length in ("1,024", "960") for name in MADE]
    assert found.left_out.keys() == {"ruler_qa_squad", "ruler_qa_hotpot"}
    assert "--squad dev-v2.0.json" in found.left_out["ruler_qa_squad"]
    text = " ".join(EXAMPLE.read_text().split())
    for task in found.tasks.values():
        made = documents(task)
        assert len(made) == task.documents == 2 and made[0] != made[1]
        for document in made:
            said = ", ".join(document["outputs"])
            assert len(words(document["input"])["input_ids"]) <= task.length
            assert task.name in ("ruler_cwe", "ruler_fwe", "ruler_vt") or all(
                value in document["input"] for value in document["outputs"]
            )
            assert task.task.process_results(document, [said]) == {str(task.length): 1.0}
            assert task.task.process_results(document, ["nothing"]) == {str(task.length): 0.0}
    essay = documents(found.tasks["niah_single_2, 1,024 tokens"])[0]["input"]
    assert text[:40] in essay and "The grass is green" not in essay


def test_documents_depend_on_seed_task_length_and_number_alone(only, words):
    only("ruler")
    names = ("niah_multikey_1", "ruler_cwe", "ruler_vt", "ruler_fwe")
    found = loaded(words, *names, limit=1)
    other = loaded(words, *names[::-1], lengths=(960, 1024), limit=3)
    for label, task in found.tasks.items():
        assert documents(task)[0] == documents(other.tasks[label])[0], label


def test_nothing_is_cut_at_the_models_last_position(only, words):
    """Room is left for the answer's first words, and for answers that lm-eval does not count."""
    only("ruler")
    for task in loaded(words, "ruler_fwe", "ruler_vt", lengths=(POSITIONS,)).tasks.values():
        for document in documents(task):
            prompt = f"{document['input']} {document['gen_prefix']}"
            new = task.task.config.generation_kwargs["max_gen_toks"]
            assert len(words(prompt)["input_ids"]) + new <= POSITIONS


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Town {number} has {number * 7} towers.",
                    "qas": [
                        {
                            "question": f"How many towers has town {number}?",
                            "is_impossible": number == 0,
                            "answers": [{"text": f"{number * 7} towers"}],
                        }
                    ],
                }
            ]
        }
        for number in range(4)
    ]
}
HOTPOT = [
    {
        "question": f"Which river is near hill {number}?",
        "answer": f"River {number}",
        "context": [[f"Hill {number}", ["It is high.", f" River {number} is near."]], ["Sea", ["It is deep."]]],
    }
    for number in range(3)
]


def test_questions_of_squad_and_hotpot_come_from_files(only, words, tmp_path):
    only("ruler")
    squad, hotpot = tmp_path / "dev.json", tmp_path / "hotpot.json"
    squad.write_text(json.dumps(SQUAD))
    hotpot.write_text(json.dumps(HOTPOT))
    found = loaded(words, "ruler_qa_squad", "ruler_qa_hotpot", limit=None, squad=squad, hotpot=hotpot)
    assert [(task.name, task.documents) for task in found.tasks.values()] == [
        ("ruler_qa_squad", 3),
        ("ruler_qa_hotpot", 3),
    ]
    for task in found.tasks.values():
        for document in documents(task):
            assert document["outputs"][0] in document["input"]
            assert task.task.process_results(document, [document["outputs"][0]]) == {"1024": 1.0}
    assert loaded(words, "ruler", limit=1, squad=squad, hotpot=hotpot).left_out == {}
    squad.write_text("[]")
    with pytest.raises(InputError, match=r"--squad .*dev.json is not the file that ruler_qa_squad is made of"):
        loaded(words, "ruler_qa_squad", squad=squad)


def test_a_tokenizer_that_makes_too_much_of_an_example(only, byte_tokenizer):
    """lm-eval would look for one that fits for ever."""
    only("ruler")
    with pytest.raises(InputError, match="ruler_vt can't be made: the tokenizer makes .* tokens of its solved example"):
        loaded(byte_tokenizer, "ruler_vt", positions=8192, lengths=(4096,))


def test_ruler_runs(run, only, model_folder, tmp_path):
    """Two lengths, two methods; and the rest of a stopped run."""
    only("ruler")
    command = ["eval", "lm-eval", "--model", str(model_folder), "--haystack", str(EXAMPLE), "--limit", "1"]
    command += ["--plan", "paper", "--budget", "64", "--lengths", "1024,960", "--output", str(tmp_path), "--json"]
    status, out, err = run(*command, "--tasks", "ruler_vt,ruler_fwe")
    assert status == 0, err
    answer = json.loads(out)
    assert [(row["task"], row["length"], row["method"]) for row in answer["rows"]] == [
        (task, length, method)
        for task in ("ruler_vt", "ruler_fwe")
        for length in (1024, 960)
        for method in ("full", "tidal")
    ]
    for row in answer["rows"]:
        assert row["metrics"].keys() == {f"{row['length']},none", f"{row['length']}_stderr,none"}
        assert row["kv_read_fraction"] == 1 if row["method"] == "full" else row["kv_read_fraction"] < 0.8
        assert row["truncated"] == 0
    full = answer["results"]["full"]
    assert full["ruler_vt"].keys() >= {"1024,none", "960,none"} and answer["haystack"] == EXAMPLE.name
    means = [(mean["length"], mean["method"], mean["tasks"]) for mean in answer["ruler_means"]]
    assert means == [(length, method, 2) for length in (1024, 960) for method in ("full", "tidal")]
    assert "mean of 2 tasks of RULER: 1,024 tokens" in err and "KV read" in err
    assert len(read_cells(tmp_path / "lm-eval.jsonl").rows) == 8


@pytest.mark.parametrize(
    ("options", "words_of"),
    [
        (["--haystack", "nowhere.txt"], ["text file nowhere.txt does not exist"]),
        (["--lengths", "1024,1400"], ["--lengths 1400", "beyond the model's 1300 positions"]),
        (["--lengths", "0"], ["--lengths 0 must be positive"]),
        (["--haystack", "SHORT"], ["the haystack has 3 tokens, 1021 too few for prompts of 1024", "--lengths"]),
        (["--lengths", "300", "--tasks", "ruler_vt"], ["--lengths 300 is too short for ruler_vt"]),
        (["--lengths", "150", "--tasks", "ruler_fwe"], ["--lengths 150 is too short for ruler_fwe"]),
        (["--lengths", "200", "--tasks", "ruler_cwe"], ["--lengths 200 is too short for ruler_cwe"]),
        (["--lengths", "64"], ["--lengths 64 is too short for niah_single_2"]),
        (["--tasks", "ruler_qa_squad"], ["ruler_qa_squad can't be made", "give --squad dev-v2.0.json"]),
        (["--squad", "nowhere.json"], ["--squad nowhere.json is no file"]),
        (["--tasks", "vt"], ["task 'vt' is unknown to lm-eval", "did you mean ruler_vt?"]),
        (["--metadata", '{"max_seq_lengths": [1024]}'], ["RULER's lengths are those of --lengths"]),
    ],
)
def test_bad_input_of_ruler(run, only, model_folder, tmp_path, monkeypatch, options, words_of):
    only("ruler")
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    (tmp_path / "short.txt").write_text("Call me Ishmael")
    options = [str(tmp_path / "short.txt") if option == "SHORT" else option for option in options]
    tasks = [] if "--tasks" in options else ["--tasks", "niah_single_2"]
    haystack = [] if "--haystack" in options else ["--haystack", str(EXAMPLE)]
    lengths = [] if "--lengths" in options else ["--lengths", "1024"]
    command = ["eval", "lm-eval", "--model", str(model_folder), "--plan", "paper", "--limit", "1"]
    assert_one_line(run(*command, *tasks, *haystack, *lengths, *options), *words_of)


# ---- LongBench


def longbench_rows(classes=None):
    """As it is published."""
    return [
        {"input": f"What has whale {number}?", "context": f"Whale {number} has a white head. " * 8,
         "answers": ["a white head", "a head"], "length": 50, "dataset": "qasper", "language": "en",
         "all_classes": classes, "_id": str(number)}
        for number in range(3)
    ]  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("qasper", "gov_report", "lcc", "passage_count", "multifieldqa_zh"):
        write_rows(folder / f"{name}.jsonl", longbench_rows())
    write_rows(folder / "trec.jsonl", longbench_rows(["a white head", "a tail"]))
    return folder


def test_longbench_is_read_from_a_folder(only, words, published):
    only("longbench")
    names = ("qasper", "gov_report", "lcc", "trec", "multifieldqa_zh")
    settings = TaskSettings(tuple(f"longbench_{name}" for name in names), longbench=published, limit=2)
    config = SimpleNamespace(max_position_embeddings=POSITIONS)
    found = load_tasks(*find_tasks(settings), settings, config, words)
    for task in found.tasks.values():
        document = documents(task)[0]
        prompt = task.task.doc_to_text(document)
        assert task.documents == 2 and "Whale 0 has a white head." in prompt
        assert ("What has whale 0?" in prompt) == (task.name not in ("longbench_gov_report", "longbench_lcc"))
        assert task.task.process_results(document, ["a white head"])["score"] == pytest.approx(1)
        assert task.task.process_results(document, ["It is cold"])["score"] < 0.5


def test_longbench_runs(run, only, model_folder, published):
    only("longbench")
    command = ["eval", "lm-eval", "--model", str(model_folder), "--longbench", str(published), "--plan", "paper"]
    command += ["--tasks", "longbench_qasper", "--limit", "1", "--budget", "32", "--json"]
    status, out, err = run(*command)
    assert status == 0, err
    full, tidal = json.loads(out)["rows"]
    assert full["metrics"].keys() >= {"score,none", "qa_f1_score,none"} and full["length"] is None
    assert tidal["kv_read_fraction"] < full["kv_read_fraction"] == 1
    assert str(published) not in out


@pytest.mark.parametrize(
    ("tasks", "line", "words_of"),
    [
        ("longbench_musique", None, ["has no musique.jsonl", "there are gov_report, lcc,"]),
        ("longbench_single", None, ["has no narrativeqa.jsonl"]),
        ("longbench_qasper", "{", ["qasper.jsonl line 4 is no JSON"]),
        ("longbench_qasper", "[]", ["line 4 is no JSON object"]),
        ("longbench_qasper", '{"input": "", "answers": ["a"]}', ["line 4: 'context' is missing"]),
        ("longbench_qasper", '{"input": 1, "context": "c", "answers": ["a"]}', ["line 4: 'input' is not a text"]),
        ("longbench_qasper", '{"input": "", "context": " ", "answers": ["a"]}', ["line 4: 'context' is empty"]),
        ("longbench_qasper", '{"input": "", "context": "c", "answers": []}', ["line 4: 'answers' holds no texts"]),
        ("longbench_trec", '{"input": "", "context": "c", "answers": ["a"]}', ["line 4: 'all_classes' is missing"]),
    ],
)
def test_bad_input_of_longbench(run, only, model_folder, published, monkeypatch, tasks, line, words_of):
    only("longbench")
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    if line is not None:
        with (published / f"{tasks.removeprefix('longbench_')}.jsonl").open("a") as file:
            file.write(line + "\n")
    command = ["eval", "lm-eval", "--model", str(model_folder), "--longbench", str(published), "--plan", "paper"]
    assert_one_line(run(*command, "--tasks", tasks), *words_of)


def test_folders_of_longbench(run, only, model_folder, tmp_path):
    only("longbench")
    command = ["eval", "lm-eval", "--model", str(model_folder), "--tasks", "longbench_qasper", "--plan", "paper"]
    assert_one_line(run(*command, "--longbench", "nowhere"), "--longbench nowhere is no folder")
    assert_one_line(run(*command, "--longbench", str(tmp_path)), "it holds no .jsonl file; data.zip of LongBench")
