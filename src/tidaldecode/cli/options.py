"""Options that several commands share, and the checks that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tidaldecode.errors import InputError
from tidaldecode.models import DeviceOptions
from tidaldecode.options import budget as one_budget
from tidaldecode.options import budgets, integers, names_of

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
    return None if text is None else one_budget("--budget", text)


def parse_budgets(text: str, option: str = "--budgets") -> tuple[int | float, ...]:
    """See `tidaldecode.options.budgets`."""
    return budgets(option, text)


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """See `tidaldecode.options.integers`."""
    return integers(option, text)


def parse_names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """See `tidaldecode.options.names_of`."""
    names: tuple[str, ...] = names_of(*known)(option, text)
    return names


def parse_device(name: str | None) -> torch.device:
    """See `DeviceOptions`."""
    return DeviceOptions(name).find_device()


def parse_dtype(name: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device) -> torch.dtype:
    """See `DeviceOptions`."""
    return DeviceOptions(dtype=name).find_dtype(device)


def make_folder(option: str, folder: Path) -> None:
    """Makes a folder of results, unless it is there.

    Raises:
        InputError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder} can't be made a folder: {error.strerror}") from None
