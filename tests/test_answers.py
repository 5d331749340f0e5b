"""`eval answers`: questions and their documents, what is measured, what is kept and taken up again, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from command_line import assert_one_line
from families import plan_for
from tidaldecode import InputError, apply
from tidaldecode.evaluate.answer_settings import AnswerSettings
from tidaldecode.evaluate.answers import answers
from tidaldecode.evaluate.free_running import full_log_prob, own_answers, surprise, write_answer
from tidaldecode.evaluate.generation_settings import Sampling
from tidaldecode.evaluate.overlap import loops, repetition, rouge_l, token_f1
from tidaldecode.evaluate.prompt import HeldPrompt
from tidaldecode.evaluate.study import measure
from tidaldecode.methods.method import Method
from tidaldecode.report import answers as articles
from tidaldecode.report.folder import read_results
from tidaldecode.report.shares import SharesRead
from tidaldecode.results.cells import Cells, read_cells
from tidaldecode.texts.questions import SHIPPED, Question, QuestionSource, ask

BOOK = "".join(f"On day {day} the ship saw {day + 3} whales.\n" for day in range(1, 60))
TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
SETTINGS = AnswerSettings(context=200, max_new_tokens=12, plain_prompt=True)
SAMPLED = replace(SETTINGS, sampling=Sampling(temperature=1.0, seed=3))


@pytest.fixture
def folder(tmp_path):
    """A file of questions, about a file, a folder and a text."""
    (tmp_path / "notes").mkdir()
    for name in ("a", "b"):
        (tmp_path / "notes" / f"{name}.txt").write_text(f"Note {name}.")
    (tmp_path / "book.txt").write_text(BOOK)
    lines = [
        {"document": "book.txt", "question": "How many?", "reference": ["four whales", "five"], "task": "count"},
        {"document": "notes/", "question": "Which?", "id": "notes"},
        {"document": "A text with a dot. And no name.", "question": "What?", "reference": "dot"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


@pytest.fixture
def asked(byte_tokenizer):
    questions = [Question(name, BOOK, f"{name}?", ("four whales",), at=BOOK.index("day 9")) for name in ("one", "two")]
    return list(ask(byte_tokenizer, questions, SETTINGS.context, plain=True))


@pytest.fixture
def llama(tiny):
    return apply(tiny("llama"), "full")


# ---- questions


def test_a_document_is_a_text_or_a_path_beside_the_questions(folder, monkeypatch):
    book, notes, text = QuestionSource(folder / "questions.jsonl").read()
    assert (book.name, book.document, book.references, book.task) == ("1", BOOK, ("four whales", "five"), "count")
    assert (notes.name, notes.document, notes.references) == ("notes", "Note a.\nNote b.\n", ())
    assert text.document == "A text with a dot. And no name." and text.references == ("dot",)
    (folder / "moved").mkdir()
    (folder / "book.txt").rename(folder / "moved" / "book.txt")
    assert QuestionSource(folder / "questions.jsonl", folder / "moved", limit=1).read() == (book,)


def test_what_is_left_of_a_document(byte_tokenizer):
    tokenizer = byte_tokenizer
    place = BOOK.index("On day 30 ")

    def left(context=200, **cut):
        question = Question("q", BOOK, "Who?", **cut)
        (one,) = ask(tokenizer, [question], context, plain=True)
        assert len(one.token_ids) <= context
        text = tokenizer.decode(one.token_ids)
        assert text.endswith("\n\nQuestion: Who?\nAnswer:")
        assert one.cut == (text.partition("\n\nQuestion")[0] != BOOK.rstrip())
        return text.partition("\n\nQuestion")[0]

    assert BOOK.startswith(left()) and len(left()) > 160
    assert BOOK[place:].startswith(left(at=place))
    end = left(at=place, depth=1)
    assert BOOK[:place].rstrip().endswith(end.rstrip()) and len(end) > 160  # nothing behind it
    middle = left(at=place, depth=0.25)
    assert abs(middle.index("On day 30 ") - 0.25 * len(middle)) < 3
    near_the_end = BOOK.index("On day 59 ")
    assert BOOK.rstrip().endswith(left(at=near_the_end, depth=0.25)) and len(left(at=near_the_end, depth=0.25)) > 160
    assert left(5000) == BOOK.rstrip() == left(5000, at=place, depth=0.5)
    assert left(5000, at=place, depth=1) == BOOK[:place].rstrip()  # also where all would fit


def test_words_that_tell_a_place(folder):
    lines = [
        {"document": "book.txt", "question": "Q", "at": "whales.   On day 7", "depth": 0.5},
        {"document": "book.txt", "question": "Q", "at": 12},
        {"document": "book.txt", "question": "Q", "depth": 1},
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words, number, end = QuestionSource(folder / "questions.jsonl").read()
    assert (words.at, words.depth) == (BOOK.index("whales.\nOn day 7"), 0.5)
    assert number.at == 12 and (end.at, end.depth) == (len(BOOK), 1)


def test_the_set_that_ships():
    """The half without the novel; the file's other half has the same form."""
    questions = QuestionSource(limit=20).read()
    assert len({question.document for question in questions}) > 5
    assert all(question.at for question in questions if "module" not in question.question)
    code = [question for question in questions if question.task == "code"]
    assert len(code) == 5 and all(question.depth == 1 for question in code)
    with pytest.raises(InputError, match=r"line 21: the document moby_dick.txt is not in \.: .* --limit 20"):
        QuestionSource().read()


def test_forty_questions_half_of_them_summaries():
    lines = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == 40
    assert [line["task"] for line in lines].count("summary") == 20
    assert all(line.get("reference") for line in lines if line["task"] not in ("summary", "code"))


# ---- measures


def test_overlap_of_words():
    assert rouge_l("The whale, the ship!", "the ship the whale") == 2 * 2 / 8
    assert token_f1("The whale, the ship!", "the ship the whale") == 1
    assert rouge_l("a b c d", "a x c y z") == token_f1("a b c d", "a x c y z") == 2 * 2 / 9
    assert rouge_l("", "") == token_f1("", "") == 1
    assert rouge_l("", "a") == token_f1("a", "") == 0


def test_repetition_and_loops():
    assert repetition(range(40)) == repetition(range(7)) == 0
    assert repetition([*range(8), *range(8)]) == pytest.approx(1 / 9)
    assert not loops(range(100)) and not loops([5] * 31) and loops([5] * 32)
    once = list(range(40))
    assert loops([1, 2, 3, *once * 3]) and not loops(once * 2) and not loops([*once * 3, 7])


def test_answers_are_the_methods_and_full_attention_judges_them(llama, tiny, asked):
    """Against a model without a plan, which knows full attention alone."""
    held, plain = HeldPrompt(llama, 300), tiny("llama")
    prompt = torch.tensor([asked[0].token_ids])
    held.read(prompt, decode=0)
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(prompt, **greedy)[0, prompt.shape[1] :].tolist()
    assert write_answer(held, Method.named("full"), 12, Sampling(), 0) == expected
    other = write_answer(held, Method.named("streaming", 8), 12, Sampling(), 0)
    assert other != expected
    assert write_answer(held, Method.named("full"), 12, Sampling(), 0) == expected  # the cache is as before
    for answer in (expected, other):
        tokens = torch.cat([prompt, torch.tensor([answer])], 1)
        logits = plain(tokens).logits[0, prompt.shape[1] - 1 : -1].detach()
        log_probs = logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        assert full_log_prob(held, answer) == pytest.approx(float(log_probs.mean()), abs=1e-4)


def test_surprise_of_a_plan_on_full_attentions_own_answers(llama, asked):
    own = own_answers(llama, [one.token_ids for one in asked], 16, SAMPLED.sampling)
    assert [one.prompt for one in own] == [one.token_ids for one in asked]
    assert all(0 < len(one.answer) <= 16 for one in own) and own[0].seed != own[1].seed
    whole = surprise(llama, own, Method.named("tidal", 300, plan_for(llama.config)), 16, SAMPLED.sampling)
    assert whole.mean == pytest.approx(0, abs=1e-6) and len(whole.each) == 2
    few = surprise(llama, own, Method.named("streaming", 4), 16, SAMPLED.sampling)
    assert few.mean == pytest.approx(sum(few.each) / 2) and abs(few.mean) > 0.01 and few.stderr > 0


def test_the_study(llama, byte_tokenizer, asked):
    methods = [Method.named("streaming", 300), Method.named("streaming", 8)]
    study = answers(byte_tokenizer, asked, SAMPLED, methods)
    cells = Cells(study.key)
    full, floor, whole, few = measure(study, llama, cells)
    assert [row.label for row in (full, floor, whole, few)] == ["full", "full, another seed", "streaming", "streaming"]
    assert full.means["surprise"].value == 0 and full.means["rouge_l"].value == full.means["f1"].value == 1
    # the same random numbers, and all is read: the same words
    assert [cell["token_ids"] for cell in whole.cells] == [cell["token_ids"] for cell in full.cells]
    assert whole.means["surprise"].value == pytest.approx(0, abs=1e-6)
    assert [cell["token_ids"] for cell in floor.cells] != [cell["token_ids"] for cell in full.cells]
    assert whole.means["kv_read_fraction"].value == 1 and few.means["kv_read_fraction"].value < 0.05
    cell = cells.rows[-1]
    assert cell["prompt_tokens"] == len(asked[1].token_ids) and cell["cut"] and cell["references"] == ["four whales"]
    assert cell["reference_f1"] == token_f1(cell["text"], "four whales")
    rows = study.to_json([full, floor, whole, few])["rows"]
    assert rows[1]["nll_over_other_seed"] == 1 and rows[3]["surprise"] == few.means["surprise"].value
    greedy = answers(byte_tokenizer, asked, SETTINGS, methods)
    assert [way.label for way in greedy.ways] == ["full", "streaming 300", "streaming 8"]


# ---- the command


@pytest.fixture
def command(tiny_folder, folder):
    """A run that takes a second."""
    return [
        "eval", "answers", "--model", str(tiny_folder), "--questions", str(folder / "questions.jsonl"), "--context",
        "120", "--max-new-tokens", "8", "--plan", "paper", "--budget", "16", "--plain-prompt",
    ]  # fmt: skip


def test_eval_answers(run, command, folder, monkeypatch):
    output = folder / "results"
    more = ["--method", "tidal,streaming", "--temperature", "0.8", "--output", str(output), "--json"]
    status, out, err = run(*command, *more)
    assert status == 0, err
    answer = json.loads(out)
    assert answer["surprise"] is None and answer["questions"] == "questions.jsonl" and answer["temperature"] == 0.8
    assert len(answer["rows"]) == 4 and len(answer["cells"]) == 4 * 3 and answer["figure"].endswith("answers.png")
    assert (output / "answers.png").read_bytes().startswith(b"\x89PNG")
    row = answer["rows"][-1]
    assert (row["method"], row["budget"], row["questions"]) == ("streaming", 16, 3)
    assert row["surprise_stderr"] > 0 and row["reference_rouge_l"] is not None and row["tokens"] <= 8
    assert "full," in err and "another" in err and "nats /" in err
    file = read_cells(output / "answers.jsonl")
    assert len(file.rows) == 12 and str(folder) not in json.dumps(file.header)
    # a question that has changed is answered again, and the others are not
    questions = folder / "questions.jsonl"
    questions.write_text(questions.read_text().replace("How many?", "How few?"))
    again = json.loads(run(*command, *more)[1])["cells"]
    same = {"notes", "3"}
    assert [cell for cell in again if cell["question"] in same] == [
        cell for cell in answer["cells"] if cell["question"] in same
    ]
    assert {cell["asked"] for cell in again if cell["question"] == "1"} == {"How few?"}
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    status, printed, err = run(*command, *more)
    assert json.loads(printed)["cells"] == again
    (kept,), _ = read_results(output)
    (output / "printed.json").write_text(printed)
    assert [result.file for result in read_results(output)[0]] == ["answers.jsonl"]  # the other one says the same
    (output / "printed.json").rename(folder / "notes" / "printed.json")
    (shown,), _ = read_results(folder / "notes")
    first, second = (articles.answers(result, "a", SharesRead([])) for result in (kept, shown))
    assert (first.figures, first.tables) == (second.figures, second.tables) and len(second.texts) == 3
    assert {text.title: text.texts for text in first.texts} == {text.title: text.texts for text in second.texts}
    assert_one_line(run(*command, *more, "--seed", "1"), "answers.jsonl", "seed 0", "seed 1")


def test_a_chat_template_is_used(byte_tokenizer, folder, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", TEMPLATE)
    questions = QuestionSource(folder / "questions.jsonl").read()
    texts = [byte_tokenizer.decode(one.token_ids) for one in ask(byte_tokenizer, questions, 120)]
    assert texts[2] == "<A text with a dot. And no name.\n\nWhat?>"
    assert texts[0].startswith("<On day 1 ") and texts[0].endswith("\n\nHow many?>") and len(texts[0]) in (119, 120)


LINE = {"document": "book.txt", "question": "Who?"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", ["line 1 is no JSON object"]),
        ("{", ["line 1 is no JSON object"]),
        ({"document": "x"}, ["line 1 has no 'question'"]),
        ({"question": "x"}, ["line 1 has no 'document'"]),
        ({"document": " ", "question": "x"}, ["line 1: the document is empty"]),
        ({"document": "empty.txt", "question": "x"}, ["line 1: the document empty.txt is empty"]),
        ({"document": "nowhere.txt", "question": "x"}, ["line 1: the document nowhere.txt is not in", "--texts"]),
        (LINE | {"question": 3}, ["line 1: the question is empty or no text"]),
        (LINE | {"question": "why " * 200}, ["question 1", "leave none of a context of 120", "--context"]),
        (LINE | {"reference": [3]}, ["line 1: the reference must be a text"]),
        (LINE | {"at": "no such words"}, ["line 1: the words of 'at' are not in the document"]),
        (LINE | {"at": 10**9}, ["line 1: 'at' must be words of the document, or a number"]),
        (LINE | {"depth": 2}, ["line 1: depth 2"]),
        (LINE | {"depth": 1, "at": 0}, ["line 1: nothing of the document is left"]),
        (LINE | {"task": 1}, ["line 1: id and task"]),
    ],
)
def test_bad_questions(run, command, folder, line, words, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    (folder / "empty.txt").write_text("\n")
    (folder / "questions.jsonl").write_text(line if isinstance(line, str) else json.dumps(line))
    assert_one_line(run(*command), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "600"], ["a context of 600 tokens is beyond the model's 512 positions"]),
        (["--context", "508"], ["508 tokens and answers of 8", "512 positions", "--context 504 at most"]),
        (["--max-new-tokens", "600"], ["answers of 600 tokens", "512 positions"]),
        (["--questions", "nowhere.jsonl"], ["nowhere.jsonl does not exist"]),
        (["--texts", "nowhere"], ["--texts nowhere is no folder"]),
        (["--top-p", "0.5"], ["--top-p samples"]),
        (["--budget", "1"], ["budget 1 is too small"]),
    ],
)
def test_bad_options(run, command, options, words, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    assert_one_line(run(*command, *options), *words)


def test_a_base_model_and_two_questions_of_one_id(run, command, folder, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.ModelFiles.model", lambda *arguments: 1 / 0)
    assert_one_line(run(*command[:-1]), "no chat template", "--plain-prompt")
    (folder / "questions.jsonl").write_text(json.dumps(LINE | {"id": "a"}) + "\n" + json.dumps(LINE | {"id": "a"}))
    assert_one_line(run(*command), "line 2", "a question before it has the id 'a'")
    (folder / "questions.jsonl").write_text("\n")
    assert_one_line(run(*command), "questions.jsonl holds none")
