"""Questions about long documents: a JSONL file of them, the set that ships, and documents cut to a context."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tidaldecode.errors import InputError
from tidaldecode.options import Option
from tidaldecode.text_file import read_text
from tidaldecode.texts.prompt import Prompt
from tidaldecode.texts.text import paul_graham_essays, text_parts

if TYPE_CHECKING:  # it takes seconds to import, and a wrong file is told without it
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHIPPED = Path(__file__).with_name("questions.jsonl")
"""40 questions: the first 20 about Paul Graham's essays and Python's library, then about *Moby-Dick*."""

_ESSAYS = "PaulGrahamEssays/"
_PATH = re.compile(r"[^\n]{1,255}(/|\.[A-Za-z]\w{0,7})")


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        name: tells it from the others of its file.
        document: the whole text, before it is cut.
        references: right answers, of which the nearest counts; none where nobody wrote one.
        task: its kind, such as `summary`.
        at: a place in the document, in characters.
        depth: where that place lies in what is left of the document: at 0 this begins there, at 1 it ends there.
    """

    name: str
    document: str
    question: str
    references: tuple[str, ...] = ()
    task: str | None = None
    at: int = 0
    depth: float = 0.0


@dataclass(frozen=True)
class QuestionSource:
    """Where questions come from: a JSONL file, or, if none is given, the set that ships."""

    questions: Annotated[
        Path | None, Option("JSONL of document, question, reference. Default: the 40 that ship.", metavar="F.jsonl")
    ] = None
    texts: Annotated[
        Path | None, Option("Folder of documents that go by a path. Default: the questions'.", metavar="DIR")
    ] = None
    limit: Annotated[int | None, Option("First questions only.", min=1)] = None

    @property
    def title(self) -> str:
        """What results call them."""
        return "shipped" if self.questions is None else self.questions.name

    def read(self) -> tuple[Question, ...]:
        """The questions, with their documents.

        Raises:
            InputError: a file is missing or can't be read, or a line says no question about a text.
        """
        file = self.questions or SHIPPED
        if self.texts is not None and not os.path.isdir(self.texts):
            raise InputError(f"--texts {self.texts} is no folder: give the one that the documents lie in")
        folders = [self.texts or (Path() if self.questions is None else file.parent)]
        if self.questions is None:
            folders.append(Path(sysconfig.get_path("stdlib")))
        lines = [line for line in enumerate(read_text("questions", file).split("\n"), 1) if line[1].strip()]
        documents: dict[str, str] = {}
        found: dict[str, Question] = {}
        for number, line in lines[: self.limit]:
            where = f"questions {file.name}, line {number}"
            fields = _fields(where, line)
            given = fields["document"]
            if given not in documents:
                documents[given] = _document(where, given, folders, len(found))
            question = _question(where, str(fields.get("id", number)), documents[given], fields)
            if question.name in found:
                raise InputError(f"{where}: a question before it has the id {question.name!r}: give each its own")
            found[question.name] = question
        if not found:
            raise InputError(f"questions {file} holds none: give a line for each, a JSON object")
        return tuple(found.values())


def _fields(where: str, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InputError(f'{where} is no JSON object: give one such as {{"document": "book.txt", "question": "Who?"}}')
    for name in ("document", "question"):
        if name not in fields:
            raise InputError(f"{where} has no {name!r}: each line needs a document and a question")
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise InputError(f"{where}: the {name} is empty or no text")
    return fields


def _question(where: str, name: str, document: str, fields: dict[str, Any]) -> Question:
    references, depth, task = fields.get("reference") or [], fields.get("depth", 0), fields.get("task")
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list) or not all(isinstance(text, str) and text.strip() for text in references):
        raise InputError(f"{where}: the reference must be a text, or a list of them")
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
        raise InputError(f"{where}: depth {depth!r} must lie from 0 (the start of what is left) to 1 (its end)")
    if not (task is None or isinstance(task, str)) or max(len(name), len(task or "")) > 80:
        raise InputError(f"{where}: id and task must be short texts")
    place = _place(where, fields.get("at", round(depth * len(document))), document)
    if not (document[:place] if depth == 1 else document[place:] if depth == 0 else document).strip():
        raise InputError(f"{where}: nothing of the document is left, which is cut at {place} with depth {depth}")
    return Question(name, document, fields["question"], tuple(references), task, place, float(depth))


def _document(where: str, given: str, folders: Sequence[Path], before: int) -> str:
    """A text as it is given, or that of a file, or of the `.txt` files of a folder; `before` it are other questions."""
    if given == _ESSAYS:
        return paul_graham_essays()
    if not _PATH.fullmatch(given):
        return given
    path = next((folder / given for folder in folders if (folder / given).exists()), None)
    if path is None:
        mend = "give the folder that it lies in with --texts" + (
            f", or stop before it with --limit {before}" * (before > 0)
        )
        raise InputError(f"{where}: the document {given} is not in {folders[0]}: {mend}")
    text = "".join(text_parts(path))
    if not text.strip():
        raise InputError(f"{where}: the document {given} is empty")
    return text


def _place(where: str, at: Any, document: str) -> int:
    """A place in characters, which may be told by words that stand there, however they are wrapped into lines."""
    if isinstance(at, str) and at.strip():
        found = re.search(r"\s+".join(map(re.escape, at.split())), document)
        if found is None:
            raise InputError(f"{where}: the words of 'at' are not in the document: {at[:60]!r}")
        return found.start()
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= len(document):
        raise InputError(f"{where}: 'at' must be words of the document, or a number from 0 to {len(document)}")
    return at


@dataclass(frozen=True)
class Asked:
    """A question as a model reads it.

    Attributes:
        token_ids: of the prompt: what is left of the document, and the question, in the model's chat template.
        cut: whether something of the document was left out.
    """

    question: Question
    token_ids: tuple[int, ...]
    cut: bool


def ask(tokenizer: Tokenizer, questions: Sequence[Question], context: int, plain: bool = False) -> Iterator[Asked]:
    """Prompts of at most `context` tokens: of a longer document, the stretch in which `at` lies at `depth` is left.

    Args:
        plain: a text to go on with, `Question: ... Answer:`, instead of a turn in the chat template.

    Raises:
        InputError: there is no chat template, or a question leaves no token for its document.
    """
    if not plain and tokenizer.chat_template is None:
        raise InputError(
            "the model has no chat template, as base models have none: give --plain-prompt, and it goes on with "
            "'Question: ... Answer:'"
        )
    offsets: dict[str, list[tuple[int, int]]] = {}
    for question in questions:
        if question.document not in offsets:
            offsets[question.document] = _offsets(tokenizer, question.document)
        yield _asked(tokenizer, question, offsets[question.document], context, plain)


def _offsets(tokenizer: Tokenizer, document: str) -> list[tuple[int, int]]:
    """Where each token of a document begins and ends, in characters."""
    if not tokenizer.is_fast:
        raise InputError("the model's tokenizer does not say where its tokens lie: documents can't be cut by it")
    return tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]


def _asked(
    tokenizer: Tokenizer, question: Question, offsets: Sequence[tuple[int, int]], context: int, plain: bool
) -> Asked:
    own = len(Prompt("", question.question).token_ids(tokenizer, plain))
    room = context - own
    while room > 0:
        document = _cut(question, offsets, room)
        ids = Prompt(document, question.question).token_ids(tokenizer, plain)
        if len(ids) <= context:
            return Asked(question, tuple(ids), len(document) < len(question.document))
        room -= len(ids) - context  # tokens are other ones where document and question meet
    raise InputError(
        f"question {question.name}: {own} tokens with its template leave none of a context of {context} for the "
        "document: shorten the question, or raise --context"
    )


def _cut(question: Question, offsets: Sequence[tuple[int, int]], room: int) -> str:
    """The stretch of a document that is left in so many tokens."""
    place, depth = bisect_left(offsets, (question.at, 0)), question.depth
    before, after = round(depth * room), room - round(depth * room)
    if 0 < depth < 1:  # else nothing may come before the place, or nothing behind it
        before = min(place, max(before, room - (len(offsets) - place)))
        after = room - before
    start, end = max(0, place - before), min(len(offsets), place + after)
    return question.document[offsets[start][0] : offsets[end - 1][1]] if end > start else ""
