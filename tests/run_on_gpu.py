"""Runs the tests that need a GPU, all or a part of them, and writes a log of the run: `make test-gpu`.

Without a GPU those marked `gpu` are skipped and those marked `kernels` run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tidaldecode.results.environment import environment

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("gpu", "kernels")


class Log:
    """A pytest plugin: takes every `parts`-th test, and notes how each ends and how long it takes.

    Neighbouring tests take about as long as each other, so that the parts do, too.

    Args:
        part: 1 for the first.
        parts: how many there are.
    """

    def __init__(self, part: int, parts: int) -> None:
        self.part, self.parts = part, parts
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.seconds: Counter[str] = Counter()

    @pytest.hookimpl(trylast=True)  # after -m
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        mine = items[self.part - 1 :: self.parts]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
        items[:] = mine

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report.nodeid, "failed", report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self._note(report.nodeid, report.outcome, report.longreprtext)

    def _note(self, test: str, outcome: str, text: str) -> None:
        if self.outcomes.get(test) != "failed":
            self.outcomes[test] = outcome
        if outcome == "failed":
            self.reasons.setdefault(test, (text.strip().splitlines() or [""])[-1][:300])

    def summary(self) -> dict[str, Any]:
        """Counts of outcomes, what failed and why, and the seconds of each test function with all its cases."""
        counts = Counter(self.outcomes.values())
        functions: dict[str, list[float]] = {}
        for test, seconds in self.seconds.items():
            functions.setdefault(test.split("[")[0], []).append(seconds)
        durations = {name: {"tests": len(of), "seconds": round(sum(of), 1)} for name, of in sorted(functions.items())}
        return {
            **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
            "failures": dict(sorted(self.reasons.items())),
            "durations": durations,
        }


def main() -> int:
    """Runs a part of the tests.

    Returns:
        pytest's exit status; 2 where there is no GPU.
    """
    options = _options()
    if not torch.cuda.is_available() and not options.without_gpu:
        print("test-gpu: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    log, start = Log(options.part, options.parts), time.monotonic()
    arguments = [*marked_files(ROOT / "tests"), f"--rootdir={ROOT}", "-m", " or ".join(MARKS), *options.pytest]
    status = int(pytest.main(arguments, plugins=[log]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "sources_sha256": _sources_digest(),
        "part": f"{options.part} of {options.parts}",
        **environment(device),
        "cuda": torch.version.cuda,
        "exit_status": status,
        "seconds": round(time.monotonic() - start, 1),
        **log.summary(),
    }
    path = options.output / _name(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"test-gpu: {path}", file=sys.stderr)
    return status


def marked_files(folder: Path) -> list[str]:
    """The files that hold such tests: others may need packages that are not there."""
    marks = [f"mark.{mark}" for mark in MARKS]
    return [str(path) for path in sorted(folder.glob("test_*.py")) if any(mark in path.read_text() for mark in marks)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, default=1, help="which part of the tests, from 1")
    parser.add_argument("--parts", type=int, default=1, help="how many parts there are")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-tests", help="folder")
    parser.add_argument("--without-gpu", action="store_true", help="try the script itself where there is no GPU")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    options = parser.parse_args()
    if not 1 <= options.part <= options.parts:
        parser.error(f"--part {options.part}: give 1 to {options.parts}")
    return options


def _commit() -> str | None:
    """The commit that is checked out, `+` behind it if files differ from it; `None` outside of a repository."""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain"])
    try:
        head, changes = (subprocess.run(["git", "-C", ROOT, *c], capture_output=True, text=True) for c in commands)
    except OSError:
        return None
    return None if head.returncode else head.stdout.strip() + "+" * bool(changes.stdout.strip())


def _sources_digest() -> str:
    """Tells which code ran, whether or not it was committed: SHA-256 of all that lies in `src` and `tests`."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _name(record: dict[str, Any]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", str(record["device"]).lower()).strip("-")
    part = "" if record["part"] == "1 of 1" else "_" + record["part"].replace(" ", "-")
    return f"{record['date'][:10]}_{device}{part}.json"


if __name__ == "__main__":
    sys.exit(main())
