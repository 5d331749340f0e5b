"""The log of the tests that need a GPU, and the marks that collect them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import run_on_gpu
from run_on_gpu import MARKS, Log, marked_files

TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("case", range(5))
def test_cases(case):
    assert case != 3, "no threes"

@pytest.mark.kernels
def test_skipped():
    pytest.skip("why not")

@pytest.mark.gpu
def test_fails_at_its_end(request):
    request.addfinalizer(lambda: 1 / 0)

def test_of_the_cpu():
    raise AssertionError
"""


@pytest.fixture
def run_part(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_others.py").write_text("import nothing_that_is_there")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: a\n    kernels: b\n")

    def run(part: int, parts: int) -> Log:
        log = Log(part, parts)
        options = [
            "--noconftest",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:terminal",
            f"--rootdir={tmp_path}",
        ]
        options += ["-c", str(tmp_path / "pytest.ini"), "-m", " or ".join(MARKS)]
        pytest.main([*marked_files(tmp_path), *options], plugins=[log])
        return log

    return run


def test_a_log_counts_and_names_what_failed(run_part):
    summary = run_part(1, 1).summary()
    assert (summary["passed"], summary["failed"], summary["skipped"]) == (4, 2, 1)
    assert set(summary["failures"]) == {"test_some.py::test_cases[3]", "test_some.py::test_fails_at_its_end"}
    assert summary["durations"]["test_some.py::test_cases"]["tests"] == 5
    assert "test_some.py::test_of_the_cpu" not in summary["durations"]


def test_parts_hold_every_test_once(run_part):
    first, second = (set(run_part(part, 2).outcomes) for part in (1, 2))
    assert (len(first), len(second)) == (4, 3)
    assert len(first | second) == 7


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_on_gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_on_gpu.main() == 2
    assert capsys.readouterr().err == "test-gpu: PyTorch sees no GPU here\n"


def test_tests_that_need_a_gpu_have_its_mark():
    """A `skipif` of their own would hide them from `make test-gpu`."""
    hidden = re.compile(r"skipif\([^)\n]*(cuda|GPU)|skip\([^)\n]*GPU")
    files = [
        path for path in Path(__file__).parent.rglob("*.py") if path.name not in (Path(__file__).name, "conftest.py")
    ]
    assert [path.name for path in files if hidden.search(path.read_text())] == []
