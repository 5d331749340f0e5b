"""A GGUF file is converted once: without loss, under its own name, again only where its content is another."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from tidaldecode import InputError
from tidaldecode.models import ChosenModel, find_model
from tidaldecode.models import cache as model_cache
from tidaldecode.models import gguf as gguf_file

CPU = torch.device("cpu")
SHAPES = {"token_embd": (288, 32), "output_norm": (32,), "output": (288, 32)}
for layer in range(2):
    block = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_norm": (32,), "ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    SHAPES |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}


def write_gguf(path: Path, kind: Kind = Kind.F32, name: str | None = "Tiny 2.5", seed: int = 0, **options) -> Path:
    """A random Llama of two layers; its matrices in `kind`, its norms in float32, as llama.cpp has them."""
    writer = gguf.GGUFWriter(path, "llama")
    if name is not None:
        writer.add_name(name)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(288)
    if options.get("tokenizer", True):
        _add_tokenizer(writer)
    random = np.random.default_rng(seed)
    for tensor, shape in SHAPES.items():
        if tensor == options.get("without"):
            continue
        values = random.standard_normal(shape, np.float32)
        stored = kind if len(shape) == 2 else Kind.F32
        writer.add_tensor(f"{tensor}.weight", gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<eos>", "<pad>", *sorted(ByteLevel.alphabet()), "ab", "abc"]
    tokens += [f"<unused{number}>" for number in range(288 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 286)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{% for message in messages %}<pad>{{ message.content }}<eos>{% endfor %}")


def find(path: Path, report=lambda step: None):
    return find_model(str(path), report=report)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".digests")


@pytest.fixture
def tiny_gguf(tmp_path, empty_cache, monkeypatch):
    monkeypatch.setattr(gguf_file, "_SETTLED", 0.0)
    return write_gguf(tmp_path / "some file.gguf")


def refuse(*arguments, **options):
    raise AssertionError("it is read again")


def test_the_second_start_reads_safetensors_alone(tiny_gguf, empty_cache, monkeypatch):
    """Configuration, tokenizer and weights; it does not even read the file to tell it from others."""
    steps = []
    first = find(tiny_gguf, steps.append)
    for name in ("GGUFReader", "convert"):
        monkeypatch.setattr(gguf_file, name, refuse)
    monkeypatch.setattr(gguf_file.hashlib, "file_digest", refuse)
    second = find(tiny_gguf, refuse)
    assert second == first
    (folder,) = names(empty_cache)
    assert folder.startswith("tiny-2-5-") and len(folder) == len("tiny-2-5-") + 16
    assert str(empty_cache / folder) in steps[0] and "`tidaldecode cache`" in steps[1]
    assert {path.suffix for path in (empty_cache / folder).iterdir()} <= {".json", ".jinja", ".safetensors"}
    tokenizer = second.tokenizer()
    assert tokenizer.tokenize("abcab c") == ["abc", "ab", "Ġ", "c"]
    assert tokenizer.decode(tokenizer("a , b").input_ids) == "a , b"
    assert (tokenizer.eos_token, tokenizer.padding_side) == ("<eos>", "left")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<pad>ab<eos>"
    config = second.config()
    assert (config.num_hidden_layers, config.num_key_value_heads, config.max_position_embeddings) == (2, 2, 64)
    model = second.model(CPU, torch.float32)
    assert model.generation_config.eos_token_id == 0
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 288)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
def test_nothing_is_lost_and_16_bits_stay_16(tmp_path, empty_cache, kind):
    path = write_gguf(tmp_path / "a.gguf", kind)
    files = find(path)
    kept = load_file(Path(files.location) / "model.safetensors")
    expected = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in ("token_embd.weight", "blk.1.ffn_down.weight"):
            name = "embed_tokens" if tensor.name.startswith("token") else "layers.1.mlp.down_proj"
            weight = kept[f"model.{name}.weight"]
            assert weight.dtype == expected
            assert torch.equal(
                weight.float(), torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            )
    model = files.model(CPU, torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.embed_tokens.weight, kept["model.embed_tokens.weight"].float())


def test_as_transformers_reads_it(tiny_gguf):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([[5, 6, 7, 8]])
    files = find(tiny_gguf)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
        assert torch.equal(files.model(CPU, torch.float32)(ids).logits, theirs(ids).logits)
    text = "a line, and abc äöü.\n\n  2"
    tokenizer = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    assert files.tokenizer()(text).input_ids == tokenizer(text).input_ids
    assert files.tokenizer().pad_token == (tokenizer.pad_token or tokenizer.eos_token)
    assert files.tokenizer().all_special_ids == tokenizer.all_special_ids


def test_a_model_is_known_by_its_content(tiny_gguf, tmp_path, empty_cache, monkeypatch):
    first = find(tiny_gguf)
    copy = shutil.copy(tiny_gguf, tmp_path / "copy.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "convert", refuse)
        assert find(copy).location == first.location
    write_gguf(tiny_gguf, seed=1)  # another model under the same name, of the same size
    second = find(tiny_gguf)
    assert len(names(empty_cache)) == 2
    logits = [files.model(CPU, torch.float32)(torch.tensor([[1, 2]])).logits for files in (find(copy), second)]
    assert not torch.equal(*logits)
    identities = [ChosenModel(files, CPU, torch.float32).identity() for files in (first, second)]
    assert identities[0]["model"] == "some file.gguf" and len(identities[0]["model_digest"]) == 16


def test_a_file_that_has_just_changed_is_read_again(tiny_gguf, monkeypatch):
    """Its times may be those of a change that is yet to come."""
    monkeypatch.setattr(gguf_file, "_SETTLED", 3600.0)
    find(tiny_gguf)
    monkeypatch.setattr(gguf_file.hashlib, "file_digest", refuse)
    with pytest.raises(AssertionError, match="read again"):
        find(tiny_gguf)


def test_a_plan_is_found_by_the_models_name_and_the_files(tiny_gguf, tmp_path):
    assert find(tiny_gguf).config().name_or_path == "Tiny 2.5 (some file.gguf)"
    assert find(tiny_gguf).model(CPU, torch.float32).config.name_or_path == "Tiny 2.5 (some file.gguf)"
    assert find(write_gguf(tmp_path / "llama-x.gguf", name=None)).config().name_or_path == "llama-x"


def test_a_file_that_changes_meanwhile(tiny_gguf, empty_cache, monkeypatch):
    convert = gguf_file.convert

    def overtaken(path, folder):
        made = convert(path, folder)
        write_gguf(tiny_gguf, seed=1)
        return made

    monkeypatch.setattr(gguf_file, "convert", overtaken)
    with pytest.raises(InputError, match="some file.gguf has changed while it was read: start again"):
        find(tiny_gguf)
    assert names(empty_cache) == []


def test_damaged_files(tiny_gguf, tmp_path, empty_cache):
    whole = tiny_gguf.read_bytes()
    for size in (0, 3, 200, 900, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut.gguf' can't be read") as error:
            find(tmp_path / "cut.gguf")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"can't be read: it lacks model\.layers\.1\.mlp\.up_proj\.weight and 0 more"):
        find(write_gguf(tmp_path / "lacks.gguf", without="blk.1.ffn_up"))
    assert not empty_cache.exists() or names(empty_cache) == []


def test_a_file_without_a_tokenizer(tmp_path, empty_cache):
    """The model may do without; who asks for the tokenizer is told."""
    files = find(write_gguf(tmp_path / "bare.gguf", tokenizer=False))
    assert files.model(CPU, torch.float32).config.num_hidden_layers == 2
    with pytest.raises(InputError, match="bare.gguf' can't be read: ") as error:
        files.tokenizer()
    assert "delete" not in str(error.value)


def test_a_damaged_conversion_says_what_to_delete(tiny_gguf):
    files = find(tiny_gguf)
    (Path(files.location) / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=f"can't be read: .*; delete {files.location} and start again"):
        files.model(CPU, torch.float32)


def test_a_full_disk(tiny_gguf, empty_cache, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(InputError, match=r"the model in some file.gguf can't be stored in .*No space left"):
            find(tiny_gguf)
    monkeypatch.setattr(model_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 10**6))
    with pytest.raises(
        InputError, match="the model in some file.gguf needs 100 MB in .*, 1 MB are free: make room, or"
    ):
        find(tiny_gguf)
    assert names(empty_cache) == []


def test_a_cache_that_can_t_be_written_to(tiny_gguf, empty_cache, tmp_path, monkeypatch):
    """It serves what is in it; for anything else it says how to have another."""
    find(tiny_gguf)
    write_gguf(tmp_path / "new.gguf", seed=1)

    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    shutil.rmtree(empty_cache / ".digests")
    assert find(tiny_gguf).config().num_hidden_layers == 2
    with pytest.raises(InputError, match="can't be stored in .*: Read-only file system: .* set TIDALDECODE_CACHE"):
        find(tmp_path / "new.gguf")


def test_weights_that_a_dtype_can_t_hold_exactly_keep_theirs():
    half = torch.randn(5000).half()
    assert gguf_file._smallest(half.float()).dtype == torch.float16
    assert gguf_file._smallest(half.bfloat16().float()).dtype == torch.bfloat16
    almost = half.float()
    almost[-1] = 1 / 3  # behind what is looked at first
    assert gguf_file._smallest(almost) is almost
    assert gguf_file._smallest(torch.tensor([1e30, 1e-3])).dtype == torch.float32
