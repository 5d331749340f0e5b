"""Options that several commands share, and the checks that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tidaldecode.errors import InputError
from tidaldecode.whole_file import check_writable, is_standard_output

if TYPE_CHECKING:
    import torch

Model = Annotated[
    str, typer.Option("--model", metavar="NAME|PATH", help="Demo model, local folder, GGUF file or hub id.")
]
Plan = Annotated[
    str,
    typer.Option("--plan", metavar="NAME|FILE", help="A plan file, 'auto', 'paper', or the name of a shipped plan."),
]
Budget = Annotated[
    str | None, typer.Option("--budget", metavar="K", help="Tokens a sparse layer reads, or a fraction of the context.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N. Default: the GPU if there is one.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Default: bfloat16 on a GPU, float32 on a CPU."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def parse_budget(text: str | None) -> int | float | None:
    """A budget in tokens (`256`), or as a fraction of the context (`0.1`).

    Raises:
        InputError: it is no number, or not positive.
    """
    return None if text is None else _budget("--budget", text)


def parse_budgets(text: str, option: str = "--budgets") -> tuple[int | float, ...]:
    """Budgets with commas between them, as `parse_budget` takes one.

    Raises:
        InputError: one of them is no number, or not positive.
    """
    return tuple(dict.fromkeys(_budget(option, item) for item in text.split(",")))


def _budget(option: str, text: str) -> int | float:
    try:
        budget = float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is no number: give tokens (256) or a fraction (0.1)") from None
    if not budget > 0:
        raise InputError(f"{option} {text} must be positive")
    if isinstance(budget, float) and budget > 1:
        raise InputError(f"{option} {text}: a fraction of the context lies in (0, 1]; give tokens as a whole number")
    return budget


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Positive whole numbers with commas between them.

    Raises:
        InputError: one of them is no such number.
    """
    try:
        numbers = [int(item) for item in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: give whole numbers with commas between them (1024,4096)") from None
    if min(numbers) < 1:
        raise InputError(f"{option} {min(numbers)} must be positive")
    return tuple(dict.fromkeys(numbers))


def parse_names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names with commas between them.

    Raises:
        InputError: one of them is unknown.
    """
    names = tuple(dict.fromkeys(item.strip() for item in text.split(",")))
    for name in names:
        if name not in known:
            raise InputError(f"{option} {name!r} is unknown: give some of {','.join(known)}")
    return names


def parse_device(name: str | None) -> torch.device:
    """The device of a name.

    Raises:
        InputError: the name is unknown, or there is no such device.
    """
    import torch

    from tidaldecode.models.device import default_device

    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is unknown: give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not supported: give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here")
    return device


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` depends on the device.

    Raises:
        InputError: the GPU does not have it.
    """
    import torch

    from tidaldecode.models.device import check_dtype, default_dtype

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = dtypes.get(name) or default_dtype(device)
    check_dtype(device, dtype)
    return dtype


def make_folder(option: str, folder: Path) -> None:
    """Makes a folder of results, unless it is there.

    Raises:
        InputError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder} can't be made a folder: {error.strerror}") from None


def output_file(option: str, name: str, example: str, json_output: bool) -> Path:
    """The file of an option, `-` being standard output; it need not exist, but can be written.

    Args:
        example: name of such a file, for messages.
        json_output: whether `--json` wants standard output for itself.

    Raises:
        InputError: it is a folder, its own folder is missing, or it can't be written to.
    """
    path = Path("/dev/stdout" if name == "-" else name)
    if path.is_dir():
        raise InputError(f"{option} {name} is a folder: give a file, such as {path / example}")
    if json_output and is_standard_output(path):
        raise InputError(f"{option} {name} and --json both write to standard output: leave out one of them")
    check_writable(option, path)
    return path
