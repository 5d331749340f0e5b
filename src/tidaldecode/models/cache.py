"""The folder of the user's cache where models lie in Transformers' format, each made once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from platformdirs import user_cache_path

from tidaldecode.errors import InputError

_ORIGIN = "tidaldecode.json"  # says what a folder was made from; of the demo model there is none
DEMO_MODEL = "smollm2-135m"
_UNFINISHED = ".unfinished"  # a hidden folder of this ending is where a model is being made
_DELETED = ".deleted-"  # and of this beginning, where one is being deleted


class CachedModel(NamedTuple):
    """A model in the cache folder.

    Attributes:
        name: of its folder.
        folder: where it lies.
        num_bytes: what its files take.
        made_from: the file that it was made from, where that was one of the user's.
    """

    name: str
    folder: Path
    num_bytes: int
    made_from: str | None


def cache_folder() -> Path:
    """Where models are kept: `TIDALDECODE_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("TIDALDECODE_CACHE") or user_cache_path("tidaldecode"))


def digests_folder() -> Path:
    """Where digests of the user's files are remembered."""
    return cache_folder() / ".digests"


def is_complete(folder: Path) -> bool:
    """Whether a model lies in a folder: it gets its name only when all its files are there."""
    return (folder / "config.json").is_file()


def kept_folder(
    name: str, what: str, num_bytes: int, make: Callable[[Path], Path], report: Callable[[str], None]
) -> Path:
    """The folder of a model in the cache; made if it is not there yet, by one process at a time.

    Whatever ends the making, Ctrl-C among it, leaves nothing behind; what a killed process left goes with the next try.

    Args:
        name: of the folder.
        what: the model, in words.
        num_bytes: that making it takes on the disk.
        make: given an empty folder to work in; returns the folder that it made in there.
        report: told, in words, if another process is making the same model.

    Raises:
        InputError: no room on the disk, or the cache folder can't be written to.
    """
    folder = cache_folder() / name
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _workplace(folder, what, report) as workplace:
            if not is_complete(folder):  # another process may have made it meanwhile
                _check_room(folder.parent, what, num_bytes)
                publish(make(workplace), folder)
    except OSError as error:
        raise InputError(
            f"{what} can't be stored in {folder.parent}: {error.strerror or error}: "
            "mend that, or set TIDALDECODE_CACHE to another folder"
        ) from error
    return folder


def publish(made: Path, folder: Path) -> None:
    """Gives a complete folder its name, unless another process was faster."""
    if folder.exists() and not is_complete(folder):
        shutil.rmtree(folder)
    try:
        os.replace(made, folder)
    except OSError:
        if not is_complete(folder):
            raise


def write_origin(folder: Path, *, name: str | None, file: str, sha256: str) -> None:
    """Says in a model's folder what it was made from: a file, the model's name in it, and the file's digest."""
    text = json.dumps({"name": name, "file": file, "sha256": sha256})
    (folder / _ORIGIN).write_text(text, encoding="utf-8")


def origin_of(folder: Path) -> dict[str, Any] | None:
    """What `write_origin` said; `None` where no complete model made from a file lies in the folder."""
    try:
        origin = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(origin, dict) and origin.keys() >= {"name", "file", "sha256"}
    return origin if known and is_complete(folder) else None


def cached_models() -> list[CachedModel]:
    """The models in the cache folder, by name; what else a user keeps there is none."""
    found = []
    for folder in sorted(cache_folder().glob("*/")):
        origin = origin_of(folder)
        if origin is not None or (folder.name == DEMO_MODEL and is_complete(folder)):
            found.append(CachedModel(folder.name, folder, _size(folder), origin["file"] if origin else None))
    return found


def delete_model(model: CachedModel) -> None:
    """Deletes a model from the cache; a process that starts meanwhile sees all of it or nothing.

    Raises:
        InputError: it can't be deleted.
    """
    try:
        with tempfile.TemporaryDirectory(dir=model.folder.parent, prefix=_DELETED) as doomed:
            os.replace(model.folder, Path(doomed) / model.name)
    except OSError as error:
        raise InputError(f"{model.folder} can't be deleted: {error.strerror or error}") from error


def delete_unfinished() -> None:
    """Deletes what killed processes left in the cache folder, and digests; not what running processes are making."""
    for folder in (digests_folder(), *cache_folder().glob(f"{_DELETED}*")):
        shutil.rmtree(folder, ignore_errors=True)
    for place in cache_folder().glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError), (place / "lock").open("a") as lock:
            if _lock(lock, wait=False):
                shutil.rmtree(place)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check_room(folder: Path, what: str, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"{what} needs {num_bytes / 1e6:,.0f} MB in {folder}, {free / 1e6:,.0f} MB are free: "
            "make room, or set TIDALDECODE_CACHE to a folder on another disk"
        )


@contextmanager
def _workplace(folder: Path, what: str, report: Callable[[str], None]) -> Iterator[Path]:
    """An empty folder beside `folder`, on the same disk, while no other process has one for it; deleted in the end.

    Where the file system has no locks, several processes may have one each, and the first to finish wins.
    """
    place = folder.with_name(f".{folder.name}{_UNFINISHED}")
    with _locked(place, what, report) as alone:
        if alone:
            for leftover in place.glob("work-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        workplace = Path(tempfile.mkdtemp(dir=place, prefix="work-"))
        try:
            yield workplace
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process, without locks, is still at work there
                (place / "lock").unlink(missing_ok=True)
                place.rmdir()


@contextmanager
def _locked(place: Path, what: str, report: Callable[[str], None]) -> Iterator[bool]:
    """Makes and locks a folder, waiting for who has it; gives whether there are locks."""
    while True:
        place.mkdir(exist_ok=True)
        try:
            lock = (place / "lock").open("a")
        except FileNotFoundError:  # who had the folder has just deleted it
            continue
        with lock:
            alone = _lock(lock, wait=False)
            if alone is False:
                report(f"another process is making {what}: waiting for it")
                alone = _lock(lock, wait=True)
            if alone is None or _is_at(lock, place / "lock"):
                yield alone is not None
                return


def _lock(file: IO[str], *, wait: bool) -> bool | None:
    """Locks a file until it is closed: whether it did; `None` where the system or the file system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of a name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
