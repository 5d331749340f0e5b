"""A file that is there whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidaldecode.errors import InputError

_OPEN_FILES = re.compile(r"(?:/proc/\d+|/dev)/fd")  # folder of a process's open files, by their numbers
_MOST_LINKS = 40  # that Linux follows, too


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the file's place when the block ends well, and is removed when it doesn't.

    Of a symbolic link the file that it points to is written. A pipe, a device, and an open file (`/dev/stdout`,
    `/dev/fd/N`) get the content at the block's end. Of several writers the last one wins, whole.

    Raises:
        InputError: it can't be written: no space, no permission, ...
    """
    temporary = None
    try:
        stream = is_stream(path)
        target = Path(os.path.realpath(path))
        temporary = _new_file(Path(tempfile.gettempdir()) if stream else target.parent, path.name)
        yield temporary
        if stream:
            _send(temporary, path)
        else:
            _keep_mode(target, temporary)
            os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # after the rename there is none
                temporary.unlink()


def check_writable(option: str, path: Path) -> None:
    """Refuses a file whose folder is missing or can't be written to, and a stream that can't be.

    Args:
        option: that names the file, for messages.

    Raises:
        InputError: it is, or can't.
    """
    try:
        stream = is_stream(path)
    except OSError as error:
        raise InputError(f"{option} {path} can't be written: {error.strerror}") from None
    if stream:
        if not os.access(path, os.W_OK):
            raise InputError(f"{option} {path} can't be written to")
        return
    folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise InputError(f"{option} {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: the folder {folder} can't be written to")


def make_results_folder(option: str, path: Path) -> None:
    """Makes the folder of a file of results, unless it is there.

    Args:
        option: that names the folder, for messages.

    Raises:
        InputError: it can't be made, or the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path.parent} can't be made a folder: {error.strerror}") from None
    check_writable(option, path)


def is_stream(path: Path) -> bool:
    """Whether a path is no file whose place another can take: a pipe, a device, or a file that is open by a number.

    Raises:
        OSError: its links form a ring, or a folder can't be read.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _open_number(path) is not None


def is_standard_output(path: Path) -> bool:
    """Whether a path stands for the standard output of this process: `/dev/stdout`, `/dev/fd/1`."""
    return _open_number(path) == 1


def _open_number(path: Path) -> int | None:
    """The number by which this process has a path open, if that is what the path, or a link to it, says."""
    for _ in range(_MOST_LINKS):
        parent = os.path.realpath(path.parent)
        if _OPEN_FILES.fullmatch(parent) and path.name.isdecimal():
            return int(path.name) if parent in ("/dev/fd", f"/proc/{os.getpid()}/fd") else None
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return None


def _new_file(folder: Path, name: str) -> Path:
    """An empty file that nobody else has, with the rights of a new file."""
    path = folder / f".{name[:32]}-{secrets.token_hex(6)}.tmp"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def _keep_mode(target: Path, temporary: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.copymode(target, temporary)


def _send(temporary: Path, path: Path) -> None:
    """Writes the content behind what a stream got before."""
    number = _open_number(path)
    if number == 1 and sys.stdout is not None:
        sys.stdout.flush()
    # a number is used as it is: opened anew, a file would be written from its start
    with temporary.open("rb") as content, path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as out:
        shutil.copyfileobj(content, out)
