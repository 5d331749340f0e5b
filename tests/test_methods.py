"""Methods by name, and a new one, which is one file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tidaldecode import InputError, TidalCache, apply
from tidaldecode.evaluate.perplexity import perplexity
from tidaldecode.evaluate.study import measure
from tidaldecode.methods import method as registry
from tidaldecode.methods.method import METHOD_KEY, METHODS, Method, check_methods, every_method
from tidaldecode.models import model_shape
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import Windows

TEXT = Text(torch.randint(2, 260, (129,), generator=torch.Generator().manual_seed(3), dtype=torch.int32))
HERE = Path(__file__).parent


@pytest.fixture
def last_tokens(monkeypatch):
    """The baseline of docs/adding-a-method.md, for as long as a test."""
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))
    from last_tokens import LastTokens

    LastTokens.__init_subclass__()
    return LastTokens


@pytest.fixture
def llama(tiny):
    return apply(tiny("llama"), "full")


def test_a_new_method_goes_by_its_name(last_tokens, llama):
    with pytest.raises(InputError, match="'last-tokens' needs a budget"):
        Method.named("last-tokens")
    with pytest.raises(InputError, match="last-tokens: budget 1 is too small: the new token and a chosen one make 2"):
        Method.named("last-tokens", 1)
    with pytest.raises(InputError, match="give one of full, tidal, quest, streaming, oracle, last-tokens"):
        Method.named("first-tokens", 9)
    both = list(every_method(["last-tokens"], [16, 0.25], page_size=(4,), plan=()))
    assert [method.label for method in both] == ["last-tokens 16", "last-tokens 0.25"]
    assert both[0].key() == dict.fromkeys(METHOD_KEY) | {"method": "last-tokens", "budget": 16}
    check_methods(both, llama.config, 64)
    attention = both[1].attention(model_shape(llama.config), 64)
    assert isinstance(both[0], last_tokens) and attention.kv_read_fraction(64) == 0.25


def test_a_new_method_is_measured(last_tokens, llama):
    """Beside StreamingLLM, which reads four other tokens of the same number; with the whole context it is full."""
    methods = [Method.named(name, budget) for name in ("last-tokens", "streaming") for budget in (16, 64)]
    windows = Windows(context=64, decode=40, windows=2, offset=5, stride=30)
    rows = measure(perplexity(TEXT, windows, methods), llama)
    assert [row.variant.label for row in rows] == ["full", *["last-tokens"] * 2, *["streaming"] * 2]
    assert rows[1].nll != rows[3].nll and rows[2].nll == pytest.approx(rows[0].nll, abs=1e-6)


def test_a_new_method_decodes_as_if_it_saw_the_last_tokens_alone(last_tokens, tiny):
    """A model of one layer keeps no other trace of the tokens before them."""
    model = apply(tiny("llama", num_hidden_layers=1).double(), "full")
    ids = TEXT.tokens[None, :40].long()
    cache = TidalCache(model.config, model._tidaldecode.plan, 41)
    model(ids, past_key_values=cache)
    cache.attention = Method.named("last-tokens", 16).attention(model_shape(model.config), 41)
    logits = model(ids[:, :1], past_key_values=cache).logits[0, -1]
    positions = torch.arange(25, 41)[None]
    alone = model(torch.cat([ids[:, 25:], ids[:, :1]], 1), position_ids=positions, use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-9)


def test_the_page_shows_what_is_tested():
    code = (HERE / "last_tokens.py").read_text()
    assert len(code.splitlines()) < 60
    assert f"```python\n{code}```\n" in (HERE.parent / "docs" / "adding-a-method.md").read_text()


def test_names_are_listed_without_pytorch():
    script = "import sys; from tidaldecode.methods.method import METHODS; print(*METHODS, 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["full", "tidal", "quest", "streaming", "oracle", "False"]


def test_every_method_declares_its_own_settings():
    made = {name: Method.named(name, None if name == "full" else 64, plan=_plan(), page_size=8) for name in METHODS}
    assert {
        name: [key for key, value in method.key().items() if value is not None] for name, method in made.items()
    } == {
        "full": ["method"],
        "tidal": ["method", "plan", "plan_digest", "budget"],
        "quest": ["method", "budget", "page_size", "full_layers"],
        "streaming": ["method", "budget"],
        "oracle": ["method", "budget", "selection"],
    }


def _plan():
    from tidaldecode import TidalPlan

    return TidalPlan.paper(6)
