"""Files of results: what is kept, what is refused, what a stopped run leaves behind; and what cells say together."""

from __future__ import annotations

import codecs
import errno
import io
import json
import multiprocessing
import os
import sys

import pytest

from tidaldecode.errors import InputError
from tidaldecode.results.cells import Cells, read_cells
from tidaldecode.results.needles import NeedleCell, needle_summary
from tidaldecode.results.perplexity import ppl_summary
from tidaldecode.results.rows import MethodSettings, shared_rows

KEY = ("window", "method", "budget")
IDENTITY = {"kind": "ppl", "model": "tiny", "plans": {"paper": "a1b2"}, "context": 128, "lengths": (1, 2)}
CELLS = [
    {"window": 0, "method": "full", "budget": None, "nll": 3.0},
    {"window": 0, "method": "tidal", "budget": 64, "nll": 3.25},
    {"window": 1, "method": "tidal", "budget": 0.1, "nll": 3.5},
]


@pytest.fixture
def path(tmp_path):
    """A file with three cells."""
    path = tmp_path / "cells.jsonl"
    with Cells.open(path, IDENTITY, KEY) as cells:
        for cell in CELLS:
            cells.append(cell)
    return path


def cut(path, line: int, characters: int):
    """Leaves so many characters of a line, as a kill does, and the lines after it."""
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1][:characters] + ("\n" if line < len(lines) else "")
    path.write_text("".join(lines))


def test_a_run_goes_on_where_it_was(path):
    with Cells.open(path, IDENTITY, KEY) as cells:
        assert cells.rows == CELLS
        assert cells.find(window=0, method="tidal", budget=64) == CELLS[1]
        assert cells.find(window=1, method="tidal", budget=64) is None
        cells.append({"window": 1, "method": "full", "budget": None, "nll": 2.0})
    header, rows = read_cells(path)
    assert header["model"] == "tiny" and header["kind"] == "ppl" and header["environments"] == []
    assert rows == [*CELLS, {"window": 1, "method": "full", "budget": None, "nll": 2.0}]
    assert len(path.read_text().splitlines()) == 1 + 4


def test_a_cell_is_on_the_disk_at_once(tmp_path):
    cells = Cells.open(tmp_path / "new" / "folder" / "cells.jsonl", IDENTITY, KEY)
    cells.append(CELLS[0])
    assert read_cells(tmp_path / "new" / "folder" / "cells.jsonl").rows == CELLS[:1]


def test_without_a_file_cells_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Cells.open(None, IDENTITY, KEY) as cells:
        cells.append(CELLS[1])
        assert cells.rows == [CELLS[1]] and cells.find(window=0, method="tidal", budget=64) == CELLS[1]
    assert list(tmp_path.iterdir()) == []


def test_cells_are_found_by_their_key():
    cells = Cells.open(None, IDENTITY, KEY)
    cells.append({"window": 0, "method": "tidal", "budget": 1})
    assert cells.find(window=0, method="tidal", budget=1.0) is None  # the whole context
    with pytest.raises(TypeError, match="window, method, budget"):
        cells.find(window=0, method="tidal")
    with pytest.raises(KeyError):
        cells.append({"window": 0, "budget": 1})
    assert len(cells.rows) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "other"}, ('model "tiny"', 'model "other"')),
        ({"plans": {"paper": "ffff"}, "seed": 1}, ("a1b2", "ffff")),
        ({"seed": 1}, ("without seed", "seed 1")),
        ({"lengths": (1, 2, 3)}, ("lengths [1, 2]", "lengths [1, 2, 3]")),
        ({"kind": "needle"}, ('kind "ppl"', 'kind "needle"')),
    ],
)
def test_other_results_are_never_mixed_in(path, changed, words):
    before = path.read_bytes()
    with pytest.raises(InputError, match="give another --output, or delete the file") as caught:
        Cells.open(path, IDENTITY | changed, KEY)
    for word in (*words, str(path)):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value) and path.read_bytes() == before


def test_a_field_less_and_another_key_are_refused(path):
    with pytest.raises(InputError, match="with context 128, this run's are without context"):
        Cells.open(path, {name: value for name, value in IDENTITY.items() if name != "context"}, KEY)
    with pytest.raises(InputError, match="with key"):
        Cells.open(path, IDENTITY, ("window", "method"))


def test_a_changed_environment_is_noted(tmp_path):
    path = tmp_path / "cells.jsonl"
    for device in ("CPU", "CPU", "GPU"):
        with Cells.open(path, IDENTITY, KEY, {"device": device, "command": "eval"}) as cells:
            assert cells.rows == []
    assert [environment["device"] for environment in read_cells(path).header["environments"]] == ["CPU", "GPU"]
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("characters", [1, 20, 50])
def test_a_line_cut_off_at_the_end_is_run_again(path, caplog, characters):
    cut(path, 4, characters)
    with Cells.open(path, IDENTITY, KEY) as cells:
        assert cells.rows == CELLS[:2] and cells.find(**{name: CELLS[2][name] for name in KEY}) is None
        cells.append(CELLS[2])
    assert "line 4 is damaged and skipped" in caplog.text and len(caplog.records) == 1
    assert read_cells(path).rows == CELLS


def test_a_last_line_that_lacks_only_its_end_is_kept(path, caplog):
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with Cells.open(path, IDENTITY, KEY) as cells:
        assert cells.rows == CELLS
        cells.append({"window": 9, "method": "full", "budget": None})
    assert len(read_cells(path).rows) == 4 and not caplog.records


@pytest.mark.parametrize(
    "damage", [b'{"window": 0, "meth', b'{"window": 0, "budget": 64}', b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000]
)
def test_a_damaged_line_is_skipped_and_said_once(path, caplog, damage):
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage
    path.write_bytes(b"\n".join(lines))
    with Cells.open(path, IDENTITY, KEY) as cells:
        assert cells.rows == [CELLS[0], CELLS[2]]
    (message,) = (record.getMessage() for record in caplog.records)
    assert str(path) in message and "line 3 is damaged" in message and "\n" not in message


def test_several_damaged_lines_take_one_line(path, caplog):
    cut(path, 2, 3)
    cut(path, 3, 3)
    assert read_cells(path).rows == CELLS[2:]
    assert "lines 2, 3 are damaged" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize(
    "header", ['{"kind": "ppl", "mod', "", '{"rows": []}', '{"kind": "ppl", "model": "tiny"}', "no"]
)
def test_a_damaged_header_is_refused(path, header):
    path.write_text("\n".join([header, *path.read_text().splitlines()[1:]]))
    before = path.read_bytes()
    for read in (read_cells, lambda path: Cells.open(path, IDENTITY, KEY)):
        with pytest.raises(InputError, match="first line is damaged: give another --output, or delete the file"):
            read(path)
    assert path.read_bytes() == before


def test_a_byte_order_mark_is_no_part_of_the_first_line(path):
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    with Cells.open(path, IDENTITY, KEY) as cells:
        assert cells.rows == read_cells(path).rows != []


@pytest.mark.parametrize("way", ["fsync", "flush"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, way):
    """Also where closing the file tries to write again what is left."""
    cells = Cells.open(tmp_path / "cells.jsonl", IDENTITY, KEY)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if way == "fsync":
        monkeypatch.setattr("tidaldecode.results.cells.os.fsync", fail)
    else:
        full = io.BufferedRandom(FullDisk(cells._file.raw.name, "r+"))
        cells._file.close()
        cells._file = full
    with (
        pytest.raises(InputError, match=r"cells\.jsonl can't be written: No space left on device; the cells bef"),
        cells,
    ):
        cells.append(dict.fromkeys(KEY, 1))
    assert cells.rows == []


class FullDisk(io.FileIO):
    """A file that nothing more can be written to."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_empty_file_is_a_new_one(tmp_path):
    (tmp_path / "cells.jsonl").touch()
    with Cells.open(tmp_path / "cells.jsonl", IDENTITY, KEY) as cells:
        cells.append(CELLS[0])
    assert read_cells(tmp_path / "cells.jsonl").rows == CELLS[:1]


def test_of_cells_with_the_same_key_the_last_wins(path):
    again = CELLS[0] | {"nll": 7.0}
    with path.open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert read_cells(path).rows == [again, *CELLS[1:]]
    with Cells.open(path, IDENTITY, KEY) as cells:
        cells.append(CELLS[0])
        assert cells.rows == CELLS


def test_paths_that_cannot_be_files(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "cells.jsonl"):
        with pytest.raises(InputError, match="give another --output"):
            Cells.open(path, IDENTITY, KEY)
    with pytest.raises(InputError, match="can't be read"):
        read_cells(tmp_path / "missing.jsonl")


def _try_to_open(path, answers):
    try:
        Cells.open(path, IDENTITY, KEY).close()
        answers.put("opened")
    except InputError as error:
        answers.put(str(error))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
def test_one_process_at_a_time(path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()

    def answer() -> str:
        other = context.Process(target=_try_to_open, args=(path, answers))
        other.start()
        try:
            return answers.get(timeout=60)
        finally:
            other.join()

    with Cells.open(path, IDENTITY, KEY):
        assert "is being written by another process" in answer()
        assert read_cells(path).rows == CELLS  # a report may read it meanwhile
    assert answer() == "opened"


def ppl_row(window: int, nll: float, full_nll: float, **fields):
    position = {"nll_by_position": [nll - 0.5, nll + 0.5], "first_position": 96, "bin_tokens": 16}
    return {"window": window, "nll": nll, "full_nll": full_nll, "tokens": 32, **position, **fields}


def test_gap_and_its_standard_error():
    tidal = {"method": "tidal", "plan": "paper", "budget": 64}
    quest = {"method": "quest", "plan": None, "budget": 64, "page_size": 16, "full_layers": 2}
    rows = [
        ppl_row(0, 3.5, 3.0, **tidal),
        ppl_row(0, 3.25, 3.0, **quest),
        ppl_row(1, 4.25, 4.0, **tidal),
    ]
    first, second = ppl_summary(rows)
    assert first.variant == MethodSettings("tidal", "paper") and first.variant.label == "tidal, paper"
    assert (first.windows, first.tokens, first.nll, first.full_nll, first.gap) == (2, 64, 3.875, 3.5, 0.375)
    assert first.gap_stderr == pytest.approx(0.125)  # of .5 and .25
    assert first.nll_by_position == (3.375, 4.375)
    assert (second.windows, second.gap, second.gap_stderr) == (1, 0.25, None)
    assert second.variant.label == "quest, pages of 16, 2 full layers"


def test_one_token_is_not_the_whole_context():
    rows = [ppl_row(0, 3.5, 3.0, method="oracle", selection="per_head", budget=budget) for budget in (1, 1.0)]
    assert [summary.budget for summary in ppl_summary(rows)] == [1, 1.0]
    assert [summary.windows for summary in ppl_summary(rows)] == [1, 1]


def test_windows_of_other_lengths_are_not_averaged():
    rows = [ppl_row(0, 3.5, 3.0, method="full", budget=None) for _ in range(2)]
    rows[1]["nll_by_position"] = [1.0]
    with pytest.raises(ValueError, match="zip"):
        ppl_summary(rows)


def test_needles_are_added_up():
    tidal = {"method": "tidal", "plan": "paper", "budget": 64}
    rows = [
        {"length": 400, "depth": 1.0, "correct": 1, "total": 2, **tidal},
        {"length": 200, "depth": 0.5, "correct": 2, "total": 2, **tidal},
        {"length": 200, "depth": 0.5, "correct": 0, "total": 1, **tidal},
        {"length": 200, "depth": 0.5, "correct": 3, "total": 3, "method": "full", "plan": None, "budget": None},
    ]
    found, full = needle_summary(rows)
    assert found.cells == (NeedleCell(200, 0.5, 2, 3), NeedleCell(400, 1.0, 1, 2))
    assert (found.correct, found.total, found.accuracy) == (3, 5, 0.6)
    assert found.of_length(200) == (2, 3)
    assert full.variant == MethodSettings("full") and full.accuracy == 1


def test_shared_rows_are_of_windows_that_all_methods_have():
    full, tidal = {"method": "full", "budget": None}, {"method": "tidal", "budget": 1}
    rows = [ppl_row(window, 3.5, 3.0, **full) for window in (0, 1, 2)]
    rows += [ppl_row(window, 3.5, 3.0, **tidal) for window in (2, 1)]
    rows += [ppl_row(window, 3.5, 3.0, **tidal | {"budget": 1.0}) for window in (2, 3)]
    found = shared_rows(rows, ("window",))
    assert [row["window"] for row in found.rows] == [2, 2, 2] and (found.shared, found.known) == (1, 4)
    none = shared_rows(rows[1:2] + rows[-1:], ("window",))
    assert none.rows == rows[1:2] + rows[-1:] and (none.shared, none.known) == (0, 2)
