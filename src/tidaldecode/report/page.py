"""`report`: a folder of results as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tidaldecode.errors import InputError
from tidaldecode.report.article import Article, devices_of
from tidaldecode.report.correction_article import correction_article
from tidaldecode.report.drawing import check_matplotlib, palette
from tidaldecode.report.others import calibration_article, other_article, recall_article
from tidaldecode.report.quality import lm_eval_article, needle_article, ppl_article
from tidaldecode.report.results import Result, Skipped, read_results
from tidaldecode.report.speed import decode_article, operations_article
from tidaldecode.whole_file import check_writable, whole_file

_ARTICLES: dict[str, Callable[[Result, str], Article]] = {
    "ppl": ppl_article,
    "needle": needle_article,
    "lm-eval": lm_eval_article,
    "correction": correction_article,
    "decode": decode_article,
    "ops": operations_article,
    "recall": recall_article,
    "calibration": calibration_article,
    "other": other_article,
}
_SECTIONS = {
    "Quality": ("ppl", "needle"),
    "Tasks": ("lm-eval",),
    "Lossless decoding": ("correction",),
    "Speed": ("decode", "ops"),
    "Calibration": ("calibration", "recall"),
    "Other results": ("other",),
}
_MEASURED = {
    "ppl": "perplexity",
    "needle": "needle in a haystack",
    "lm-eval": "lm-eval tasks",
    "correction": "cache correction",
    "decode": "decode steps",
    "ops": "attention operations",
    "recall": "coherence of layers",
    "calibration": "calibration",
}


@dataclass(frozen=True)
class Section:
    """Articles of one subject."""

    title: str
    articles: tuple[Article, ...]

    @property
    def name(self) -> str:
        """Its id on the page."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Report:
    """A page that was written.

    Attributes:
        figures: id on the page, and title, of each figure.
        skipped: files that are not on it.
    """

    output: Path
    figures: tuple[tuple[str, str], ...]
    skipped: tuple[Skipped, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "output": str(self.output),
            "figures": [{"id": name, "title": title} for name, title in self.figures],
            "skipped": [{"file": skipped.file, "reason": skipped.reason} for skipped in self.skipped],
        }


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
    sections = _sections(results)
    page = _page(folder, results, sections, skipped)
    with whole_file(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    articles = [article for section in sections for article in section.articles]
    figures = ((figure.name, f"{article.title}: {figure.title}") for article in articles for figure in article.figures)
    return Report(output, tuple(figures), tuple(skipped))


def _sections(results: Sequence[Result]) -> list[Section]:
    articles = [(result.kind, _ARTICLES[result.kind](result, f"r{index}")) for index, result in enumerate(results, 1)]
    sections = [
        Section(title, tuple(article for wanted in kinds for kind, article in articles if kind == wanted))
        for title, kinds in _SECTIONS.items()
    ]
    return [section for section in sections if section.articles]


def _page(folder: Path, results: Sequence[Result], sections: list[Section], skipped: list[Skipped]) -> str:
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_resource("page.html"))
    return template.render(
        title=folder.resolve().name,
        summary=_summary(results),
        sections=sections,
        cards=[card for section in sections for article in section.articles for card in article.cards],
        skipped=skipped,
        palette=palette(),
        style=Markup(_resource("page.css")),
        svg=Markup,
    )


def _summary(results: Sequence[Result]) -> str:
    """What was measured, of which models and on which devices."""
    kinds = [words for kind, words in _MEASURED.items() if any(result.kind == kind for result in results)]
    models = dict.fromkeys(result.fields["model"] for result in results if isinstance(result.fields.get("model"), str))
    devices = dict.fromkeys(device for device in map(devices_of, results) if device)
    text = _joined(kinds) or f"{len(results)} files of results"
    text = text[0].upper() + text[1:]
    if models:
        text += f" of {_joined(list(models))}"
    return text + (f", measured on {_joined(list(devices))}." if devices else ".")


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _resource(name: str) -> str:
    return resources.files("tidaldecode.report").joinpath(name).read_text(encoding="utf-8")
