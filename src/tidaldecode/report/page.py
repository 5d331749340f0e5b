"""`report`: a folder of results as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tidaldecode.errors import InputError
from tidaldecode.report import articles, overview
from tidaldecode.report.article import Article
from tidaldecode.report.drawing import check_matplotlib, palette
from tidaldecode.report.folder import Result, Skipped, read_results
from tidaldecode.report.shares import SharesRead
from tidaldecode.whole_file import check_writable, whole_file


class _Kind(NamedTuple):
    """What a page does with one kind of files.

    Attributes:
        section: where they stand on the page.
        measured: what was measured, in words.
    """

    section: str
    measured: str | None
    article: Callable[[Result, str, SharesRead], Article]


_KINDS = {
    "ppl": _Kind("Quality", "perplexity", articles.perplexity),
    "needle": _Kind("Quality", "needle in a haystack", articles.needles),
    "lm-eval": _Kind("Tasks", "lm-eval tasks", articles.tasks),
    "correction": _Kind("Lossless decoding", "cache correction", articles.correction),
    "decode": _Kind("Speed", "decode steps", articles.decode_steps),
    "ops": _Kind("Speed", "attention operations", articles.operations),
    "calibration": _Kind("Calibration", "calibration", articles.calibration),
    "recall": _Kind("Calibration", "coherence of layers", articles.coherence),
    "plan": _Kind("Plans", None, articles.values),
    "values": _Kind("Other results", None, articles.values),
}
"""In the order of the page."""


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
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: give a file, such as {output / 'report.html'}")
    check_writable("--output", output)
    results, skipped = read_results(folder)
    shares = SharesRead(results)
    opening = [found for found in (overview.losses(results, shares), overview.speeds(results)) if found is not None]
    sections: dict[str, list[Article]] = {}
    for kind, (section, _, article) in _KINDS.items():
        for number, result in enumerate(results, 1):
            if result.kind == kind:
                sections.setdefault(section, []).append(article(result, f"r{number}-", shares))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_resource("page.html")).render(
        title=folder.resolve().name,
        summary=_summary(results),
        opening=opening,
        sections=sections,
        skipped=skipped,
        palette=palette(),
        style=Markup(_resource("page.css")),
        svg=Markup,
    )
    with whole_file(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    shown = [*opening, *(article for own in sections.values() for article in own)]
    figures = [{"id": f.name, "title": f"{article.title}: {f.title}"} for article in shown for f in article.figures]
    return Report(output, figures, skipped)


def _summary(results: Sequence[Result]) -> str:
    """What was measured, of which models and on which devices."""
    kinds = [kind.measured for name, kind in _KINDS.items() if kind.measured and name in {r.kind for r in results}]
    models = dict.fromkeys(result.fields["model"] for result in results if isinstance(result.fields.get("model"), str))
    devices = dict.fromkeys(result.devices for result in results if result.devices)
    text = _joined(kinds) or f"{len(results)} files of results"
    text = text[0].upper() + text[1:]
    if models:
        text += f" of {_joined(list(models))}"
    return text + (f", measured on {_joined(list(devices))}." if devices else ".")


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _resource(name: str) -> str:
    return resources.files("tidaldecode.report").joinpath(name).read_text(encoding="utf-8")
