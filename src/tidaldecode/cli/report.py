"""`tidaldecode report`: a folder of results as a page to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tidaldecode.cli import options
from tidaldecode.cli.output import output_file

_NAMED = 5  # files that are left out


def report(
    results_dir: Annotated[
        str, typer.Argument(metavar="RESULTS_DIR", help="Folder of evaluations' and benchmarks' results.")
    ],
    output: Annotated[str, typer.Option("--output", metavar="F.html", help="The page.")] = "report.html",
    json_output: options.Json = False,
) -> None:
    """Turns a folder of results into one HTML page with figures and tables, which needs no network."""
    page = output_file("--output", output, "report.html", json_output)
    console = Console(stderr=True)
    with console.status("reading"):
        from tidaldecode.report.page import write_report

        written = write_report(Path(results_dir), page)
    for skipped in written.skipped[:_NAMED]:
        console.print(Text(f"left out {skipped.file}: {skipped.reason}"), soft_wrap=True)
    if len(written.skipped) > _NAMED:
        console.print(f"and {len(written.skipped) - _NAMED:,} more: the page lists them", highlight=False)
    console.print(Text(f"{output}: {len(written.figures)} figures"), soft_wrap=True)
    if json_output:
        print(json.dumps(written.to_json()))
