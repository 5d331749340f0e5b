"""A GGUF file: its weights, configuration and tokenizer as a folder in Transformers' format, converted once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError, one_line
from tidaldecode.models.cache import cache_folder, digests_folder, kept_folder, origin_of, write_origin
from tidaldecode.whole_file import whole_file

_SHARD = "2GB"  # saving copies a file of weights in memory
_SETTLED = 2.0  # seconds after which a file's times tell it from a later one, on any file system
_LONG = 2**31  # bytes of a file that take so long to read that one is told
_SAMPLE = 4096  # weights that are looked at first
_MARGIN = 100_000_000  # bytes: tokenizer, and what else takes room meanwhile
_HALVES = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def converted_gguf(path: Path, report: Callable[[str], None]) -> Path:
    """The folder of a GGUF file's contents in Transformers' format; made if it is not in the cache folder yet.

    They are found by the digest of the file's content: a copy is not converted again, another file of the same name is.

    Args:
        path: the file.
        report: told, in words, what takes long; Transformers draws its own progress bars on stderr.

    Raises:
        InputError: the file is damaged or of no supported kind, or the cache folder can't take it.
    """
    digest = _digest(path, report)
    for folder in cache_folder().glob(f"*-{digest[:16]}"):
        origin = origin_of(folder)
        if origin is not None and origin["sha256"] == digest:
            return folder
    name, num_bytes = _name_and_room(path)
    folder_name = f"{_plain(name or path.stem)}-{digest[:16]}"

    def make(workplace: Path) -> Path:
        report(f"converting {path.name} to safetensors, once, into {cache_folder() / folder_name}")
        start = time.monotonic()
        made = convert(path, workplace / "converted")
        if _digest(path, report) != digest:
            raise InputError(f"{path} has changed while it was read: start again")
        write_origin(made, name=name, file=os.path.abspath(path), sha256=digest)
        report(f"converted in {time.monotonic() - start:.0f} s; `tidaldecode cache` lists such models and deletes them")
        return made

    return kept_folder(folder_name, f"the model in {path.name}", num_bytes, make, report)


def convert(path: Path, folder: Path) -> Path:
    """Converts a GGUF file, without loss: each tensor takes the smallest dtype that holds its values.

    Args:
        path: the file.
        folder: the folder to make. It has no tokenizer where the file has none that Transformers can read.

    Returns:
        The folder.

    Raises:
        InputError: the file can't be read, or lacks weights.
        OSError: the folder can't be written.
    """
    try:
        tokenizer, model = _tokenizer(path), _model(path)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise _unreadable(path, error) from error
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    try:
        model.save_pretrained(folder, max_shard_size=_SHARD)
    except SafetensorError as error:  # what it makes of the system's errors
        raise OSError(str(error)) from error
    return folder


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"model {str(path)!r} can't be read: {one_line(error)}")


def _tokenizer(path: Path) -> Tokenizer | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception:  # the model may do without; whoever asks for the tokenizer is told
        return None
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of what the model said
    return tokenizer


def _model(path: Path) -> PreTrainedModel:
    """The model on the CPU, its quantized weights in float32: what dequantization gives."""
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # else newer versions may leave the weights in their blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    quantized, loading = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"model {str(path)!r} can't be read: it lacks {missing[0]} and {len(missing) - 1} more")
    config = quantized.config
    if hasattr(config, "quantization_config"):  # a mark that forbids to save it
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    del quantized
    for parameter in model.parameters():
        parameter.data = _smallest(parameter.data)
    return model


def _smallest(tensor: Tensor) -> Tensor:
    """The tensor in the smallest dtype that holds exactly its values: 16-bit weights become what they were."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in (tensor.flatten()[:_SAMPLE], tensor)):
            return tensor.to(dtype)
    return tensor


def _name_and_room(path: Path) -> tuple[str | None, int]:
    """The model's name in the file, and the bytes that it will take on the disk.

    Raises:
        InputError: the file is damaged.
    """
    try:
        reader = GGUFReader(path)
        field = reader.fields.get("general.name")
        name = str(field.contents()).strip() if field is not None else ""
    except Exception as error:
        raise _unreadable(path, error) from error
    sizes = (int(tensor.n_elements) * (2 if tensor.tensor_type in _HALVES else 4) for tensor in reader.tensors)
    return name or None, sum(sizes) + _MARGIN


def _digest(path: Path, report: Callable[[str], None]) -> str:
    """SHA-256 of a file; remembered in the cache folder until the file changes.

    Raises:
        InputError: the file can't be read.
    """
    place = os.path.abspath(path)
    note = digests_folder() / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.json"
    try:
        stamp = _stamp(path)
        with suppress(OSError, ValueError, KeyError, TypeError):
            remembered = json.loads(note.read_text(encoding="utf-8"))
            if remembered["stamp"] == stamp:
                return str(remembered["sha256"])
        if stamp[0] > _LONG:
            report(f"reading all of {path.name}, to tell it from others")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = _stamp(path) == stamp and time.time() - max(stamp[1:3]) / 1e9 > _SETTLED
    except OSError as error:
        raise _unreadable(path, error) from error
    if settled:
        with suppress(OSError, InputError):  # a cache folder that can't be written to is no obstacle yet
            note.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(note) as temporary:
                temporary.write_text(json.dumps({"file": place, "stamp": stamp, "sha256": digest}), encoding="utf-8")
    return digest


def _stamp(path: Path) -> list[int]:
    """What changes with a file: its size, its times in nanoseconds (the second can't be set back), and its inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "model"
