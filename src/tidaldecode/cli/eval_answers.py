"""`tidaldecode eval answers`: answers to questions about long documents, written by each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidaldecode.cli.command import command
from tidaldecode.cli.study import StudyOptions
from tidaldecode.cli.tables import print_table
from tidaldecode.evaluate.answer_settings import AnswerSettings
from tidaldecode.evaluate.method_options import MethodOptions
from tidaldecode.report.labels import counted
from tidaldecode.texts.questions import QuestionSource

if TYPE_CHECKING:
    from tidaldecode.evaluate.study import OnProgress, Study
    from tidaldecode.models import ChosenModel


@command
def answers(source: QuestionSource, settings: AnswerSettings, methods: MethodOptions, options: StudyOptions) -> None:
    """Lets each method answer questions about long documents, and asks full attention how probable the answers are."""
    questions = source.read()

    def make(chosen: ChosenModel, on_progress: OnProgress) -> Study:
        from tidaldecode.evaluate.answers import answers_of

        return answers_of(questions, source.title, settings, methods, chosen, on_progress)

    report = options.run("answers.jsonl", make, settings.sampling.seed, methods.plans, settings.context)
    from tidaldecode.report.answers import answer_table, surprise_over_share  # what the report imports takes a while

    title = f"{report.about['model']}, {counted(len(questions), 'question')} ({source.title})"
    figures = options.draw(report, title, answers=surprise_over_share)
    rows = answer_table(report.rows, brief=True)
    title += f", prompts of {settings.context:,} tokens at most; surprise ± one standard error, nats per token"
    print_table(options.console, title, list(rows[0]), [list(row.values()) for row in rows], least=8)
    options.show(report, figure=figures[0] if figures else None)
