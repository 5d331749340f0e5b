"""A file of results, one line a cell, so that a stopped run goes on where it was and does no cell twice."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple, Self

from tidaldecode.errors import InputError

_log = logging.getLogger(__name__)

_MEND = "give another --output, or delete the file"


class CellsFile(NamedTuple):
    """What a file of results holds.

    Attributes:
        header: the fields of its first line (`kind`, `key`, model, plan, ...); `environments` is a list of the
            environments (command, versions, device) in which it was written, the oldest first.
        rows: the cells; of those with the same key the last.
    """

    header: dict[str, Any]
    rows: list[dict[str, Any]]


class Cells:
    """The cells measured so far, in memory and in a JSONL file.

    The first line of the file is its header: `{"kind": "ppl", ..., "key": [...], "environment": {...}}`. Each further
    line is a cell, or the environment of a run that took the file up again. Lines are only ever appended, and each is
    on the disk before `append` returns. The file is locked as long as it is open (where the system has `flock`).
    """

    def __init__(self, key: tuple[str, ...], rows: Iterable[dict[str, Any]] = (), file: BufferedRandom | None = None):
        self._key = key
        self._cells = {_key_of(row, key): row for row in rows}
        self._file = file

    @classmethod
    def open(
        cls,
        path: Path | None,
        identity: Mapping[str, Any],
        key: tuple[str, ...],
        environment: Mapping[str, Any] | None = None,
    ) -> Self:
        """Starts a file of results, or takes one up again.

        Args:
            path: the file; its folder is made where it is missing. `None` keeps the cells in memory only.
            identity: what all cells have in common and must not change between runs: `kind`, model, digests of plan
                and text, context, seed, dtype, ... Anything that JSON holds.
            key: names of the fields that tell a cell from the others.
            environment: what may change between runs: see `tidaldecode.results.environment.environment`.

        Raises:
            InputError: the file is of another identity or is no file of results, another process writes to it, or it
                can't be written.
        """
        if path is None:
            return cls(key)
        identity = json.loads(json.dumps({**identity, "key": key}))  # tuples become lists, as in the file
        file = _open_locked(path)
        try:
            content = file.read()
            if content:
                header, rows = _parse(path, content)
                _check_identity(path, header, identity)
                if not content.endswith(b"\n"):  # the last run was killed in the middle of a line
                    file.write(b"\n")
                cells = cls(key, rows, file)
                if environment is not None and header["environments"][-1:] != [json.loads(json.dumps(environment))]:
                    cells._write({"environment": environment})
            else:
                cells = cls(key, (), file)
                cells._write({**identity, **({} if environment is None else {"environment": environment})})
        except BaseException:
            _close(file)
            raise
        return cells

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All cells, in the order in which they were first measured."""
        return list(self._cells.values())

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The cell of a key, `None` if it is still to be measured. A budget of 1 token is not one of 1.0."""
        if set(key) != set(self._key):
            raise TypeError(f"a cell is found by {', '.join(self._key)}")
        return self._cells.get(_key_of(key, self._key))

    def append(self, cell: Mapping[str, Any]) -> None:
        """Adds a cell, which takes the place of one with the same key. It is on the disk when this returns.

        Raises:
            InputError: it can't be written; the cells before it stay.
        """
        row = json.loads(json.dumps(cell))  # as it will be read back
        key = _key_of(row, self._key)
        self._write(row)
        self._cells[key] = row

    def close(self) -> None:
        """Closes the file and so unlocks it."""
        if self._file is not None:
            _close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            mend = "the cells before it stay, and the same command goes on from there"
            raise InputError(f"{self._file.name} can't be written: {error.strerror}; {mend}") from None


def read_cells(path: Path) -> CellsFile:
    """Reads a file of results, whoever may be writing to it.

    Raises:
        InputError: it can't be read, or is no file of results.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    return _parse(path, content)


def _open_locked(path: Path) -> BufferedRandom:
    """Opens a file, locked until it is closed; where the system or the file system has no such locks, goes without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}; give another --output") from None
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            mend = "let it end, or give another --output"
            raise InputError(f"{path} is being written by another process: {mend}") from None
    file.seek(0)
    return file


def _parse(path: Path, content: bytes) -> CellsFile:
    first, *lines = content.split(b"\n")
    header = _object(first)
    key = header.get("key") if header else None
    if header is None or "kind" not in header or not isinstance(key, list):
        raise InputError(f"{path} is no file of results, or its first line is damaged: {_MEND}")
    environment = header.pop("environment", None)
    header["environments"] = [] if environment is None else [environment]
    rows: dict[str, dict[str, Any]] = {}
    damaged = []
    for number, line in enumerate(lines, 2):
        row = _object(line)
        if row is not None and row.keys() == {"environment"}:
            header["environments"].append(row["environment"])
        elif row is not None and row.keys() >= set(key):
            rows[_key_of(row, key)] = row
        elif line.strip():
            damaged.append(number)
    if damaged:
        numbers = ", ".join(map(str, damaged))
        what = f"line {numbers} is" if len(damaged) == 1 else f"lines {numbers} are"
        _log.warning("%s: %s damaged and skipped, as if never measured", path, what)
    return CellsFile(header, list(rows.values()))


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, `None` if there is no whole one."""
    with contextlib.suppress(ValueError, RecursionError):  # of the encoding too
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    return None


def _key_of(cell: Mapping[str, Any], key: Iterable[str]) -> str:
    return json.dumps([cell[name] for name in key])


def _check_identity(path: Path, header: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    theirs = {name: value for name, value in header.items() if name != "environments"}
    for name in [*identity, *(theirs.keys() - identity.keys())]:
        if name not in theirs or name not in identity or theirs[name] != identity[name]:
            raise InputError(
                f"{path} holds results {_with(name, theirs)}, this run's are {_with(name, identity)}: {_MEND}"
            )


def _with(name: str, fields: Mapping[str, Any]) -> str:
    return f"with {name} {json.dumps(fields[name])}" if name in fields else f"without {name}"


def _close(file: BufferedRandom) -> None:
    with contextlib.suppress(OSError):  # what could not be written was told by `append`
        file.close()
