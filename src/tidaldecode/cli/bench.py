"""`tidaldecode bench`: what TidalDecode costs in time, beside full attention, Quest and StreamingLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from tidaldecode.bench.shapes import RandomModel
from tidaldecode.cli import options
from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.output import output_file
from tidaldecode.cli.sets import print_sets
from tidaldecode.errors import InputError
from tidaldecode.methods.names import TIMED_METHODS
from tidaldecode.models.find import find_model
from tidaldecode.plans import read_plan
from tidaldecode.whole_file import check_writable, is_stream

if TYPE_CHECKING:
    import torch

    from tidaldecode.bench.decode import DecodeReport
    from tidaldecode.bench.operations import OperationsReport

_DEFAULT_CONFIG = "llama-3-8b"

bench = typer.Typer(help="Measures operations and decode steps on a GPU.", no_args_is_help=True)

Contexts = Annotated[str, typer.Option("--contexts", metavar="N,...", help="Tokens in the KV cache.")]
Budgets = Annotated[
    str, typer.Option("--budgets", metavar="K,...", help="Tokens a sparse layer reads, or fractions of the context.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences decoded at once.")]
Results = Annotated[
    str | None, typer.Option("--results", metavar="F", help="JSON file, written anew whenever a shape is done.")
]
Output = Annotated[
    str | None, typer.Option("--output", metavar="DIR|F.png", help="Folder or PNG file for a figure (matplotlib).")
]


@bench.command()
def ops(
    heads: Annotated[int, typer.Option("--heads", min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[str, typer.Option("--kv-heads", metavar="N,...", help="KV heads.")] = "8,32",
    head_dim: Annotated[int, typer.Option("--head-dim", min=1, help="Head dim.")] = 128,
    contexts: Contexts = "10240,32768,102400",
    budgets: Budgets = "1024,4096",
    batch: Batch = 1,
    layers: Annotated[int, typer.Option("--layers", min=3, help="Layers of a decode step.")] = 32,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    results: Results = None,
    output: Output = None,
    json_output: options.Json = False,
) -> None:
    """Times each operation of a layer, and the attention of a whole decode step by each method."""
    numbers = {
        "kv_heads": options.parse_integers("--kv-heads", kv_heads),
        "contexts": options.parse_integers("--contexts", contexts),
    }
    sizes = options.parse_budgets(budgets)
    results_file, figure_file = _results_file(results, json_output), _figure_file(output, "bench-ops.png")
    console = Console(stderr=True)
    with console.status("starting") as status:  # PyTorch takes seconds to import
        from tidaldecode.bench.operations import OperationsSettings, bench_operations
        from tidaldecode.report.plots import plot_operations

        settings = OperationsSettings(
            heads=heads, head_dim=head_dim, budgets=sizes, batch=batch, layers=layers, seed=seed, **numbers
        )
        target = _device(device)
        report = bench_operations(
            settings, target, options.parse_dtype(dtype, target), _shower(status), _saver(results_file)
        )
    _print_operations(console, report)
    _finish(report.to_json(), results_file, figure_file, plot_operations, json_output)


@bench.command()
def decode(
    config: Annotated[
        str | None, typer.Option("--config", help="A public model's shape, with random weights. Default: llama-3-8b.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME|PATH", help="A model with its weights instead.")
    ] = None,
    contexts: Contexts = "10240,32768,102400",
    budgets: Budgets = "1024",
    methods: Annotated[
        str, typer.Option("--methods", metavar="M,...", help="What to compare.")
    ] = "full,sdpa,tidal,quest,streaming",
    plan: options.Plan = "paper",
    batch: Batch = 1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Decode steps of each of two repeats.")] = 50,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    results: Results = None,
    output: Output = None,
    json_output: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Times whole decode steps of a model, from a token to the next, by each method."""
    lengths, sizes = options.parse_integers("--contexts", contexts), options.parse_budgets(budgets)
    if config is not None and model is not None:
        raise InputError("give either --config or --model, not both")
    names = options.parse_names("--methods", methods, TIMED_METHODS)
    results_file, figure_file = _results_file(results, json_output), _figure_file(output, "bench-decode.png")
    if model is not None:
        outline_of(model).check_plan(plan)
    else:
        RandomModel(config or _DEFAULT_CONFIG)
        read_plan(plan)
    console = Console(stderr=True)
    with console.status("starting") as status:  # PyTorch and Transformers take seconds to import
        from tidaldecode.bench.decode import DecodeSettings, bench_decode
        from tidaldecode.report.plots import plot_decode

        settings = DecodeSettings(
            contexts=lengths,
            budgets=sizes,
            methods=names,
            plan=plan,
            batch=batch,
            steps=steps,
            seed=seed,
        )
        target = _device(device)
        source = (
            RandomModel(config or _DEFAULT_CONFIG)
            if model is None
            else find_model(model, trust_remote_code=trust_remote_code)
        )
        report = bench_decode(
            source, settings, target, options.parse_dtype(dtype, target), _shower(status), _saver(results_file)
        )
    _print_decode(console, report)
    _finish(report.to_json(), results_file, figure_file, plot_decode, json_output)


def _device(name: str | None) -> torch.device:
    device = options.parse_device(name)
    if name is None and device.type == "cpu":
        raise InputError(
            "no CUDA GPU here: `tidaldecode bench` measures GPUs; --device cpu runs it anyway, with small sizes"
        )
    return device


def _results_file(name: str | None, json_output: bool) -> Path | None:
    return None if name is None else output_file("--results", name, "results.json", json_output)


def _figure_file(name: str | None, default: str) -> Path | None:
    """The PNG file of `--output`: itself, or a file of that name in the folder."""
    if name is None:
        return None
    from tidaldecode.report.drawing import check_matplotlib

    check_matplotlib()
    path = Path(name) if name.lower().endswith(".png") else Path(name) / default
    if path.parent == Path(name):
        options.make_folder("--output", path.parent)
    check_writable("--output", path)
    return path


def _shower(status: Status) -> Callable[[str], None]:
    return lambda what: status.update(Text(what))  # a name may look like markup


def _saver(path: Path | None) -> Callable[[OperationsReport | DecodeReport], None]:
    """Keeps what has been measured so far, should the run be stopped; a stream gets all of it once, at the end."""
    from tidaldecode.results.rows import save_results

    def save(report: OperationsReport | DecodeReport) -> None:
        if path is not None and not is_stream(path):
            save_results(report.to_json(), path)

    return save


def _finish(
    results: dict[str, Any],
    stream: Path | None,
    figure: Path | None,
    plot: Callable[[dict[str, Any], Path], None],
    json_output: bool,
) -> None:
    from tidaldecode.results.rows import save_results

    if stream is not None and is_stream(stream):
        save_results(results, stream)
    if figure is not None:
        plot(results, figure)
    if json_output:
        print(json.dumps(results))


def _print_operations(console: Console, report: OperationsReport) -> None:
    """A table for each shape."""
    console.print(_title(report), highlight=False, soft_wrap=True, markup=False)
    shapes = dict.fromkeys((row.kv_heads, row.context) for row in report.rows)
    for kv_heads, context in shapes:
        rows = [row for row in report.rows if (row.kv_heads, row.context) == (kv_heads, context)]
        title = f"{rows[0].heads} query heads, {kv_heads} KV heads, batch {rows[0].batch}, {context:,} tokens"
        table = _table(title, "operation", "budget", "µs", "floor", "over SDPA", "speed-up")
        for row in rows:
            figures = (f"{row.us:,.1f}", f"{row.floor_us:,.1f}", _ratio(row.over_sdpa), _ratio(row.speedup_vs_full))
            table.add_row(row.operation, _budget(row.budget), *figures)
        console.print(table)
        if rows[0].heads > kv_heads:
            print_sets(console, {"per_head, and step tidal": rows[0].heads / kv_heads})


def _print_decode(console: Console, report: DecodeReport) -> None:
    """One table."""
    console.print(_title(report), highlight=False, soft_wrap=True, markup=False)
    title = f"{report.model}, batch {report.batch}"
    table = _table(title, "method", "context", "budget", "ms", "floor", "over it", "speed-up", "KV read")
    for row in report.rows:
        figures = (f"{row.step_ms:,.3f}", f"{row.floor_ms:,.3f}", _ratio(row.over_floor), _ratio(row.speedup_vs_full))
        table.add_row(row.method, f"{row.context:,}", _budget(row.budget), *figures, f"{row.kv_read_fraction:.1%}")
    console.print(table)
    if report.sets_per_kv_head > 1 and any(row.method == "tidal" for row in report.rows):
        print_sets(console, {f"tidal, {report.plan or 'plan'}": report.sets_per_kv_head})
    if not all(row.captured for row in report.rows):
        console.print("the steps did not run in a CUDA graph")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=Text(title))
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _title(report: OperationsReport | DecodeReport) -> str:
    device = report.environment["device"]
    return f"{device}, {report.dtype}; memory is read at {report.read_bandwidth_gbs:,.0f} GB/s"


def _budget(budget: int | float | None) -> str:
    if budget is None:
        return ""
    return f"{budget:,}" if isinstance(budget, int) else f"{budget:g}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
