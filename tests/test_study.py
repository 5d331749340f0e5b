"""The runner of studies: a new study is one function."""

from __future__ import annotations

import pytest

from tidaldecode.evaluate.study import Case, Study, measure
from tidaldecode.methods.method import METHOD_KEY, Method
from tidaldecode.results.cells import Cells
from tidaldecode.results.rows import MethodRow

WAYS = (Method.named("full"), Method.named("streaming", 8))


class Length(MethodRow):
    """How long a word is, by a method."""

    word: str
    version: int = 0
    length: int
    over_full: int | None = None


def lengths(words, log, version=1, measure=None):
    """A study of words; the model is any object."""

    def by_method(model, case, way, full, on_part):
        log.append((case.what, way.name))
        on_part(0.5)
        return {"length": len(case.what), "over_full": None if full is None else full["length"]}

    return Study(
        row=Length,
        key=("word", *METHOD_KEY),
        identity={"kind": "lengths"},
        cases=[Case({"word": word}, word, word, parts=len(word), made_of={"version": version}) for word in words],
        ways=WAYS,
        start=lambda model: model,
        read=lambda model, case: log.append(case.what),
        measure=measure or by_method,
        summary=lambda cells: [cell["length"] for cell in cells],
        to_json=lambda rows: {"rows": rows},
    )


def test_each_case_is_read_once_and_measured_in_every_way():
    log, progress = [], []
    study = lengths(["ab", "abcd"], log)
    assert measure(study, None, on_progress=lambda *what: progress.append(what)) == [2, 2, 4, 4]
    assert log == ["ab", ("ab", "full"), ("ab", "streaming"), "abcd", ("abcd", "full"), ("abcd", "streaming")]
    assert {total for _, total, _ in progress} == {2 + 2 * 2 + 2 * 4}
    done = [done for done, _, _ in progress]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 14
    assert (1 + 1, 14, "ab: full") in progress  # half of the first cell


def test_full_attentions_cell_is_at_hand_for_the_others():
    cells = Cells(lengths([], []).key)
    measure(lengths(["abc"], []), None, cells)
    assert [(cell["method"], cell["over_full"]) for cell in cells.rows] == [("full", None), ("streaming", 3)]


def test_a_case_that_has_changed_is_measured_again():
    log, cells = [], Cells(lengths([], []).key)
    measure(lengths(["ab"], log), None, cells)
    measure(lengths(["ab", "c"], log), None, cells)  # the first is there
    assert log[3:] == ["c", ("c", "full"), ("c", "streaming")]
    log.clear()
    measure(lengths(["ab"], log, version=2), None, cells)
    assert len(log) == 3 and len(cells.rows) == 4


def test_a_field_that_the_row_does_not_declare_is_no_result():
    study = lengths(["ab"], [], measure=lambda *arguments: {"length": 2, "size": 2})
    cells = Cells(study.key)
    with pytest.raises(TypeError, match="Length does not declare size"):
        measure(study, None, cells)
    assert cells.rows == []
