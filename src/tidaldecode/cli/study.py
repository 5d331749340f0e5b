"""What the commands of `tidaldecode eval` share: their options, and how a study is run, drawn and shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.output import Json, print_json, results_file
from tidaldecode.cli.progress import progress
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

    @property
    def console(self) -> Console:
        """Where progress and tables go."""
        return Console(stderr=True)

    def run(
        self,
        name: str,
        make: Callable[..., Any],
        seed: int,
        plans: Iterable[str],
        context: int | None = None,
        figures: bool = True,
    ) -> Report:
        """Runs a study; a mistake that can be told without PyTorch, which takes seconds to import, is told before.

        Args:
            name: of the file of its cells, in the folder of results.
            make, seed: see `tidaldecode.evaluate.study.run_study`.
            plans, context: refused if they are of other models, or beyond the model's positions.
            figures: whether some will be drawn.
        """
        results = results_file("--output", self.output, name, figures)
        outline = outline_of(self.model.model)
        for plan in plans:
            outline.check_plan(plan)
        if context is not None:
            outline.check_context(context)
        # lm-eval and its tasks print what they like, and stdout is for the one JSON object
        with redirect_stdout(sys.stderr), progress(self.console) as on_progress:
            from tidaldecode.evaluate.study import run_study

            return run_study(make, self.model, seed, results, on_progress)

    def draw(self, report: Report, title: str, **drawings: Callable[..., Any]) -> list[str]:
        """Draws figures as PNG files in the folder of results, if there is one.

        Args:
            drawings: by name of the file, see `save_png`.

        Returns:
            The files; none of a figure that has nothing to show.
        """
        if self.output is None:
            return []
        files = {self.output / f"{name}.png": drawing for name, drawing in drawings.items()}
        return [str(file) for file, drawing in files.items() if save_png(drawing, report.rows, file, title)]

    def show(self, report: Report, **figures: Any) -> dict[str, Any]:
        """What stands below a study's tables, and its JSON object, which is returned."""
        print_sets(self.console, report.sets_per_kv_head)
        with redirect_stdout(sys.stderr):
            content = {**report.to_json(), **figures}
        print_json(self.json_output, content)
        return content


STUDY = StudyOptions()
