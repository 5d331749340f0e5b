"""What the commands of `tidaldecode eval` share: options, checks that need no PyTorch, and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.output import Json, print_json, results_file
from tidaldecode.cli.tables import print_sets
from tidaldecode.models import ModelOptions
from tidaldecode.options import Option
from tidaldecode.report.drawing import save_png

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import Report


@dataclass(frozen=True)
class StudyOptions:
    """Options of every study."""

    model: ModelOptions = field(default_factory=ModelOptions)
    output: Annotated[Path | None, Option("Folder of results; a stopped run goes on from there.", metavar="DIR")] = None
    json_output: Json = False

    def results(self, name: str, figures: bool = True) -> Path | None:
        """The file of cells, see `results_file`."""
        return results_file("--output", self.output, name, figures)

    def check(self, plans: Iterable[str], context: int | None = None) -> None:
        """Refuses, before PyTorch is imported, plans of other models and a context beyond the model's positions.

        Raises:
            InputError: they are, as far as the model's files say.
        """
        outline = outline_of(self.model.model)
        for plan in plans:
            outline.check_plan(plan)
        if context is not None:
            outline.check_context(context)

    def show(self, console: Console, report: Report, **figures: Any) -> None:
        """What stands below a study's tables, and its JSON object."""
        print_sets(console, report.sets_per_kv_head)
        print_json(self.json_output, {**report.to_json(), **figures})


STUDY = StudyOptions()


def draw(rows: Sequence[Any], results: Path | None, title: str, **drawings: Callable[..., Any]) -> list[str]:
    """Draws figures as PNG files beside a file of results, if there is one.

    Args:
        drawings: by name of the file, see `save_png`.

    Returns:
        The files; none of a figure that has nothing to show.
    """
    if results is None:
        return []
    files = {results.with_name(f"{name}.png"): drawing for name, drawing in drawings.items()}
    return [str(file) for file, drawing in files.items() if save_png(drawing, rows, file, title)]
