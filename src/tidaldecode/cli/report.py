"""`tidaldecode report`: a folder of results as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text

from tidaldecode.cli.command import command
from tidaldecode.cli.output import Json, output_file, print_json
from tidaldecode.options import Option

_NAMED = 5  # files that are left out


@command
def report(
    results_dir: Annotated[
        Path, Option("Folder of evaluations' and benchmarks' results.", metavar="RESULTS_DIR", positional=True)
    ],
    output: Annotated[Path, Option("The page.", metavar="F.html")] = Path("report.html"),
    json_output: Json = False,
) -> None:
    """Turns a folder of results into one HTML page with figures and tables, which needs no network."""
    page = output_file("--output", output, "report.html", json_output)
    console = Console(stderr=True)
    with console.status("reading"):
        from tidaldecode.report.page import write_report

        written = write_report(results_dir, page)
    for skipped in written.skipped[:_NAMED]:
        console.print(Text(f"left out {skipped.file}: {skipped.reason}"), soft_wrap=True)
    if len(written.skipped) > _NAMED:
        console.print(f"and {len(written.skipped) - _NAMED:,} more: the page lists them", highlight=False)
    console.print(Text(f"{output}: {len(written.figures)} figures"), soft_wrap=True)
    print_json(json_output, written.to_json())
