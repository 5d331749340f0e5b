"""`tidaldecode bench`: what TidalDecode costs in time, beside full attention, Quest and StreamingLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console

from tidaldecode.bench.settings import DecodeSettings, OperationsSettings, SourceOptions
from tidaldecode.cli.bench_generate import generate
from tidaldecode.cli.bench_tables import print_decode, print_operations
from tidaldecode.cli.command import command
from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.output import Json, figure_file, output_file, print_json
from tidaldecode.cli.progress import progress
from tidaldecode.errors import InputError
from tidaldecode.models import DeviceOptions, ModelFiles
from tidaldecode.options import Option
from tidaldecode.plans import read_plan
from tidaldecode.whole_file import is_stream

if TYPE_CHECKING:
    import torch

    from tidaldecode.bench.timing_report import TimingReport
    from tidaldecode.report.drawing import Draw

bench = typer.Typer(help="Measures operations, decode steps and whole calls of generate.", no_args_is_help=True)


@dataclass(frozen=True)
class _Outputs:
    """Where rows, and a figure of them, go."""

    results: Annotated[Path | None, Option("JSON file, written anew whenever a shape is done.", metavar="F")] = None
    output: Annotated[Path | None, Option("Folder or PNG file for a figure (matplotlib).", metavar="DIR|F.png")] = None
    json: Json = False

    def checked(self, figure: str) -> Self:
        """The files that are written; in a folder, a figure of that name."""
        file = self.results
        results = None if file is None else output_file("--results", file, "results.json", self.json)
        return replace(self, results=results, output=figure_file("--output", self.output, figure))

    def keep(self, report: TimingReport[Any]) -> None:
        """Keeps what has been measured so far, should the run be stopped; a stream gets all of it once, at the end."""
        from tidaldecode.results.rows import save_results

        if self.results is not None and not is_stream(self.results):
            save_results(report.to_json(), self.results)

    def finish(self, content: dict[str, Any], draw: Draw, title: str) -> None:
        """Writes what is written at the end."""
        from tidaldecode.report.drawing import save_png
        from tidaldecode.results.rows import save_results

        if self.results is not None and is_stream(self.results):
            save_results(content, self.results)
        if self.output is not None:
            save_png(draw, content, self.output, title)
        print_json(self.json, content)


@bench.command()
@command
def ops(settings: OperationsSettings, where: DeviceOptions, outputs: _Outputs) -> None:
    """Times each operation of a layer, and the attention of a whole decode step by each method."""
    outputs = outputs.checked("bench-ops.png")
    console = Console(stderr=True)
    with progress(console) as show:  # PyTorch takes seconds to import
        from tidaldecode.bench.operations import bench_operations
        from tidaldecode.report.speeds import operation_times

        device = _device(where)
        dtype = where.find_dtype(device)
        report = bench_operations(settings, device, dtype, lambda what: show(0, 0, what), outputs.keep)
    print_operations(console, report)
    content = report.to_json()
    outputs.finish(content, operation_times, "{device}, {dtype}".format(**content))


@bench.command()
@command
def decode(source: SourceOptions, settings: DecodeSettings, where: DeviceOptions, outputs: _Outputs) -> None:
    """Times whole decode steps of a model, from a token to the next, by each method."""
    outputs = outputs.checked("bench-decode.png")
    parts = source.parts
    if source.model is None:
        read_plan(settings.plan)
    else:
        outline_of(source.model).check_plan(settings.plan)
    console = Console(stderr=True)
    with progress(console) as show:  # PyTorch and Transformers take seconds to import
        from tidaldecode.bench.decode import bench_decode
        from tidaldecode.report.speeds import step_times
        from tidaldecode.texts.text import Text

        device = _device(where)
        dtype = where.find_dtype(device)
        found, text = source.find(), None
        if parts is not None and isinstance(found, ModelFiles):
            show(0, 0, "reading the text")
            text = Text.tokenize(found.tokenizer(), parts)
        report = bench_decode(found, settings, device, dtype, lambda what: show(0, 0, what), outputs.keep, text)
    print_decode(console, report)
    content = report.to_json()
    title = "{model}, batch {batch}: {device}, {dtype}".format(**content)
    outputs.finish(content, step_times, title)


bench.command()(generate)


def _device(where: DeviceOptions) -> torch.device:
    device = where.find_device()
    if where.device is None and device.type == "cpu":
        raise InputError(
            "no CUDA GPU here: `tidaldecode bench` measures GPUs; --device cpu runs it anyway, with small sizes"
        )
    return device
