"""The demo model, for real: needles that the shipped plan finds and the paper's does not, and the demo itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tidaldecode
from tidaldecode import TidalPlan
from tidaldecode.evaluate.needle import needle_cases, needle_found, paul_graham_essays
from tidaldecode.plans import shipped_plans

DOCUMENT = Path(__file__).parent.parent / "examples" / "moby_dick_101-103.txt"


@pytest.fixture(scope="session")
def essays() -> str:
    """The Paul Graham essays."""
    return paul_graham_essays()


def test_needles(demo_model, demo_tokenizer, essays):
    """Ten needles in 4,000 tokens, 64 read: the shipped plan against the paper's layers.

    A check that nothing broke, not a held-out score: the plan's layers were chosen on cases of this seed.
    """
    plans = shipped_plans()
    tried = {
        "full": TidalPlan.full(30),
        "shipped": plans["smollm2-135m"].with_budget(64),
        "paper": plans["smollm2-135m-paper"].with_budget(64),
    }
    tidaldecode.apply(demo_model, tried["full"])
    found = dict.fromkeys(tried, 0)
    for case in needle_cases(demo_tokenizer, essays, length=4000, depths=10, seed=1):
        assert case.prompt.shape == (1, 4000)
        for key, right in needle_found(demo_model, demo_tokenizer, case, tried).items():
            found[key] += right
    assert found["full"] >= 9
    assert found["shipped"] >= 0.9 * found["full"]
    assert found["paper"] <= 1


def test_budget_of_the_context_gives_full_attentions_tokens(demo_model, demo_tokenizer, essays):
    ids = demo_tokenizer([essays[:3000], essays[5000:7000]], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = demo_model.generate(**ids, **options)
    tidaldecode.apply(demo_model, shipped_plans()["smollm2-135m"].with_budget(1.0))
    assert torch.equal(demo_model.generate(**ids, **options), expected)


def test_the_demo(tmp_path):
    """What `make demo` runs: the question about the long document, answered."""
    command = [sys.executable, "-m", "tidaldecode", "generate", "--json", "--compare", "--max-new-tokens", "24"]
    command += ["--prompt-file", str(DOCUMENT), "--question", "What is the special magic Nantucket number?"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    answer = json.loads(result.stdout)
    assert "4817203" in answer["text"]
    assert "4817203" in answer["full"]["text"]
    assert 6000 <= answer["context_tokens"] <= 6500
    assert answer["kv_read_fraction"] < 0.34
    assert list(tmp_path.iterdir()) == []
