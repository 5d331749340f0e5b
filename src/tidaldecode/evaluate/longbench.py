"""LongBench (Bai et al. 2024) from a folder of its published JSONL files, with lm-eval's prompts and metrics."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tidaldecode.errors import InputError
from tidaldecode.text_file import read_text

PREFIX = "longbench_"
"""Of lm-eval's names of its tasks, before the name of the file."""

_CLASSES = ("trec", "lsht")  # whose score asks for `all_classes`


def task(folder: Path, name: str, limit: int | None, rules: Mapping[str, Any]) -> dict[str, Any]:
    """A task's rules, as lm-eval has them, with the documents of its file in the folder.

    Args:
        name: lm-eval's, such as `longbench_qasper`.
        limit: most documents.

    Raises:
        InputError: there is no such file, or it is none of LongBench.
    """
    path = folder / f"{name.removeprefix(PREFIX)}.jsonl"
    if not os.path.isfile(path):
        there = sorted(file.stem for file in folder.glob("*.jsonl"))
        mend = f"there are {', '.join(there)}" if there else "it holds no .jsonl file; data.zip of LongBench has them"
        raise InputError(f"--longbench {folder} has no {path.name}, which {name} is made of: {mend}")
    documents = list(itertools.islice(_documents(path), limit))
    if not documents:
        raise InputError(f"{path} has no documents")

    def data(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(documents)}

    return {**rules, "custom_dataset": data}


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    """The documents with lm-eval's names of their fields: `input` is `question` there."""
    classes = path.stem.removesuffix("_e") in _CLASSES
    for number, line in enumerate(read_text("LongBench's", path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{path} line {number} is no JSON") from None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is no JSON object")
        wanted = {"context": str, "input": str, "answers": list} | ({"all_classes": list} if classes else {})
        for key, kind in wanted.items():
            if not isinstance(row.get(key), kind):
                what = {str: "a text", list: "a list of texts"}[kind]
                raise InputError(f"{path} line {number}: {key!r} is {'missing' if key not in row else f'not {what}'}")
        if not row["context"].strip():
            raise InputError(f"{path} line {number}: 'context' is empty")
        if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
            raise InputError(f"{path} line {number}: 'answers' holds no texts, and the score compares with them")
        yield {
            "context": row["context"],
            "question": row["input"],
            "answers": row["answers"],
            "all_classes": row.get("all_classes"),
        }
