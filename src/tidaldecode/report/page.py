"""`report`: a folder of results as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tidaldecode.report import answers, articles, overview
from tidaldecode.report.article import Article
from tidaldecode.report.drawing import COLORS, check_matplotlib
from tidaldecode.report.folder import Result, Skipped, read_results
from tidaldecode.report.labels import counted
from tidaldecode.report.shares import SharesRead
from tidaldecode.whole_file import whole_file

_SECTIONS: dict[str, dict[str, Callable[[Result, str, SharesRead], Article]]] = {
    "Quality": {"ppl": articles.perplexity, "needle": articles.needles, "answers": answers.answers},
    "Tasks": {"lm-eval": articles.tasks},
    "Lossless decoding": {"correction": articles.correction},
    "Speed": {"decode": articles.decode_steps, "generate": articles.whole_runs, "ops": articles.operations},
    "Calibration": {"calibration": articles.calibration, "recall": articles.coherence},
    "Plans": {"plan": articles.values},
    "Other results": {"values": articles.values},
}
"""What is said of each kind of files, in the order of the page."""


@dataclass(frozen=True)
class Report:
    """A page that was written.

    Attributes:
        figures: `id` on the page, and `title`, of each figure.
        skipped: files that are not on it.
    """

    output: Path
    figures: list[dict[str, str]]
    skipped: list[Skipped]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self) | {"output": str(self.output)}


def write_report(folder: Path, output: Path) -> Report:
    """Writes the results of a folder, and of the folders in it, as one HTML page.

    Args:
        output: the page; an existing file stays whole until the new one is complete.

    Raises:
        InputError: the folder holds nothing that is understood, the page can't be written, or matplotlib is missing.
    """
    check_matplotlib()
    results, skipped = read_results(folder)
    shares = SharesRead(results)
    opening = [found for found in (overview.losses(results, shares), overview.speeds(results)) if found is not None]
    sections = {
        section: [
            article(result, f"r{number}-", shares)
            for kind, article in kinds.items()
            for number, result in enumerate(results, 1)
            if result.kind == kind
        ]
        for section, kinds in _SECTIONS.items()
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_resource("page.html")).render(
        title=folder.resolve().name,
        summary=_summary(results),
        opening=opening,
        sections={section: own for section, own in sections.items() if own},
        skipped=skipped,
        palette=COLORS,
        style=Markup(_resource("page.css")),
        svg=Markup,
    )
    with whole_file(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    shown = [*opening, *(article for own in sections.values() for article in own)]
    figures = [{"id": f.name, "title": f"{article.title}: {f.title}"} for article in shown for f in article.figures]
    return Report(output, figures, skipped)


def _summary(results: Sequence[Result]) -> str:
    """How many files there are, of which models and from which devices."""
    models = dict.fromkeys(result.fields["model"] for result in results if isinstance(result.fields.get("model"), str))
    devices = dict.fromkeys(result.devices for result in results if result.devices)
    text = counted(len(results), "file") + " of results" + (f", of {', '.join(models)}" if models else "")
    return text + (f", measured on {', '.join(devices)}." if devices else ".")


def _resource(name: str) -> str:
    return resources.files("tidaldecode.report").joinpath(name).read_text(encoding="utf-8")
