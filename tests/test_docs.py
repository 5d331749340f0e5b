"""What the README and the guides say runs: their Python, their command lines, their links."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

import tidaldecode
from tidaldecode.cli import app

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES, *sorted((ROOT / "docs" / "lab").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)


def command_lines() -> Iterator[list[str]]:
    """The words of each line of the pages' code blocks without a language that is a command."""
    for page in PAGES:
        for block in blocks(str(page.relative_to(ROOT)), ""):
            for line in block.replace("\\\n", "").splitlines():
                line = re.sub(r"^([A-Z]+=\S* )+", "", line)
                if re.match(r"(tidaldecode [a-z]|make |pip |python |\.ci/)", line):
                    yield shlex.split(line, comments=True)


def test_sizes():
    """The README can be read in one go, and so can each guide."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140
    for guide in GUIDES:
        assert len(guide.read_text(encoding="utf-8").splitlines()) <= 100, guide.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r'(?:\]\(|src="|srcset=")([^)"]+)', text):
        file, _, heading = target.partition("#")
        if not file.startswith("http"):
            linked = page.parent / file if file else page
            assert linked.exists(), target
            assert not heading or heading in headings(linked), target


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made of their words."""
    found = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_command_lines():
    """Every option of every line is there, and its value is of its type."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    lines = list(command_lines())
    assert len(lines) > 30
    for name, *words in lines:
        if name == "tidaldecode":
            command = typer.main.get_command(app)
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context(command.name, words)
        elif name == "make":
            assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        elif name == "pip":
            assert all(extra in extras for word in words for extra in re.findall(r"^\.\[(\w+)\]", word))
        elif name == "python" and words[0] != "-m":
            assert (ROOT / words[0]).is_file()


def test_the_readmes_python(demo_files, tmp_path, monkeypatch):
    """As it stands, but for the document: what lies around the sentence that it asks for."""
    (block,) = blocks("README.md", "python")
    document = (ROOT / "examples" / "moby_dick_101-103.txt").read_text(encoding="utf-8")
    place = document.index("special magic")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "moby_dick_101-103.txt").write_text(document[place - 900 : place + 300], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(block, {})
    assert "4817" in printed.getvalue()


@pytest.mark.parametrize("page", ["docs/python.md", "docs/lossless.md"])
def test_a_guides_python(page, tiny, tmp_path, monkeypatch):
    """With a tiny model and a plan of its own, each block by itself."""
    monkeypatch.chdir(tmp_path)
    plan = tidaldecode.TidalPlan.paper(4, reselect_layer=3, token_budget=16)
    plan.save("plan.json")
    for block in blocks(page, "python"):
        model = tiny(num_hidden_layers=4)
        prompt = {"input_ids": torch.arange(40)[None], "attention_mask": torch.ones(1, 40, dtype=torch.long)}
        model.generation_config.max_new_tokens = 20
        exec(block, {"tidaldecode": tidaldecode, "model": model, "prompt": prompt, "plan": plan})


def test_the_guides_imports():
    for page in GUIDES:
        for block in blocks(str(page.relative_to(ROOT)), "python"):
            for line in re.findall(r"^(?:from|import) tidaldecode.*", block, flags=re.M):
                exec(line, {})


def test_names():
    """What a page calls by its full name is there."""
    for page in PAGES:
        for name in re.findall(r"`(tidaldecode(?:\.\w+)+)", page.read_text(encoding="utf-8")):
            pkgutil.resolve_name(name)


def test_the_floors_of_the_guide():
    """They are those of the contract."""
    floors = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    page = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    assert "\n".join(floors[0]["layers"]).replace(" : ", ", ") in page


def test_the_benchmarks_imports(monkeypatch):
    """Scripts behind quoted numbers know the package as it is now."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for script in (ROOT / "benchmarks").glob("*.py"):
        importlib.import_module(script.stem)


def test_the_benchmark_of_rounds_runs(monkeypatch, tmp_path):
    """It asks caches for their captured passes, of which there are none on a CPU."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script, output = importlib.import_module("lossless_step"), tmp_path / "rounds.json"
    monkeypatch.setattr(script, "WARM_UP", 0)
    monkeypatch.setattr(script, "STEPS", 1)
    small = "--config tiny --device cpu --dtype float32 --context 64 --budget 16 --lengths 2 --output"
    monkeypatch.setattr(sys, "argv", ["lossless_step.py", *small.split(), str(output)])
    script.main()
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["captured"] is False
    assert [(row["drafting"], row["captured"]) for row in report["rows"]] == [("plan", False), ("verification", False)]


def test_the_plans_of_the_guide():
    plans = [tidaldecode.TidalPlan.model_validate_json(block) for block in blocks("docs/plans.md", "json")]
    assert [(plan.token_budget, plan.key_bits) for plan in plans] == [(256, None), (256, 2)]
