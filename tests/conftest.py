"""Tiny random models of every supported family, and the demo model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, see below

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which Transformers does

import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from families import FAMILIES
from tidaldecode.cli import main
from tidaldecode.models import ModelFiles, find_model

torch.set_num_threads(1)  # several wait for each other actively: on a busy machine tests take ten times as long

if importlib.util.find_spec("vllm") is None:  # it has an environment of its own
    collect_ignore = ["serving"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that need a GPU where there is none; `make test-gpu` runs them where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """Makes a tiny random model of a family, float32, in evaluation mode."""

    def make(family: str = "llama", **overrides: object) -> PreTrainedModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](**overrides))
        return model.float().eval()

    return make


@pytest.fixture(autouse=True)
def warned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told once a process is told once a test."""
    monkeypatch.setattr("tidaldecode.models.architecture._warned", set())


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: exit status, stdout, stderr."""

    def call(*arguments: str, stdin: bytes | None = None):
        monkeypatch.setattr(sys, "argv", ["tidaldecode", *arguments])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for models that is not there yet."""
    monkeypatch.setenv("TIDALDECODE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, for the tiny models: 256 tokens and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<pad>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama with its tokenizer, saved as a folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_files() -> ModelFiles:
    """The demo model's files, fetched once into the user's cache."""
    return find_model("smollm2-135m")


@pytest.fixture(scope="session")
def demo_tokenizer(demo_files: ModelFiles):
    """The demo model's tokenizer."""
    return demo_files.tokenizer()


@pytest.fixture(scope="session")
def demo_weights(demo_files: ModelFiles) -> PreTrainedModel:
    """The demo model; take `demo_model` instead, which leaves it as it was."""
    return demo_files.model(torch.device("cpu"), torch.float32)


@pytest.fixture
def demo_model(demo_weights: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The demo model, without a plan before and after the test."""
    from tidaldecode.hf import applied_plan, remove

    yield demo_weights
    if applied_plan(demo_weights) is not None:
        remove(demo_weights)
