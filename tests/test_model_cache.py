"""The cache folder: models appear in it whole, once, and go again."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from command_line import assert_one_line
from tidaldecode import InputError
from tidaldecode.models.cache import cached_models, kept_folder, origin_of, publish, write_origin


def make_model(workplace: Path, text: str = "{}") -> Path:
    made = workplace / "made"
    made.mkdir()
    (made / "config.json").write_text(text)
    write_origin(made, name="A model", file="/somewhere/a.gguf", sha256="0123")
    return made


def keep(make=make_model, report=lambda step: None) -> Path:
    return kept_folder("a", "the model a", 1000, make, report)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_made_once(empty_cache):
    assert keep() == empty_cache / "a"
    assert keep(make=None) == empty_cache / "a"
    assert names(empty_cache) == ["a"]
    assert origin_of(empty_cache / "a") == {"name": "A model", "file": "/somewhere/a.gguf", "sha256": "0123"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("damaged"), OSError(28, "No space left on device")])
def test_what_is_stopped_leaves_nothing(empty_cache, error):
    def stopped(workplace):
        make_model(workplace)
        raise error

    with pytest.raises((KeyboardInterrupt, InputError)) as raised:
        keep(stopped)
    if isinstance(error, OSError):
        assert "the model a can't be stored in" in str(raised.value) and "No space left" in str(raised.value)
        assert "set TIDALDECODE_CACHE to another folder" in str(raised.value)
    assert names(empty_cache) == []
    keep()
    assert names(empty_cache) == ["a"]


def test_what_a_killed_process_left_goes_with_the_next_try(empty_cache):
    left = empty_cache / ".a.unfinished"
    (left / "work-1" / "made").mkdir(parents=True)
    (left / "lock").touch()
    seen = []

    def look(workplace):
        seen.extend(names(left))
        return make_model(workplace)

    keep(look)
    assert "work-1" not in seen and len(seen) == 2  # the lock, and a workplace of its own
    assert names(empty_cache) == ["a"]


def test_a_second_process_waits_for_the_first(empty_cache):
    """Locks are of open files, so that two threads stand for two processes."""
    working, told, done = threading.Event(), threading.Event(), []

    def slowly(workplace):
        working.set()
        assert told.wait(60)
        return make_model(workplace)

    first = threading.Thread(target=lambda: done.append(keep(slowly)))
    first.start()
    assert working.wait(60)
    steps = []
    second = keep(lambda workplace: 1 / 0, lambda step: (steps.append(step), told.set()))
    first.join(60)
    assert done == [second] == [empty_cache / "a"]
    assert steps == ["another process is making the model a: waiting for it"]
    assert names(empty_cache) == ["a"]


def test_a_second_process_goes_on_where_the_first_fails(empty_cache):
    working, told = threading.Event(), threading.Event()

    def fail(workplace):
        working.set()
        assert told.wait(60)
        raise InputError("damaged")

    def first():
        with pytest.raises(InputError, match="damaged"):
            keep(fail)

    thread = threading.Thread(target=first)
    thread.start()
    assert working.wait(60)
    keep(make_model, lambda step: told.set())
    thread.join(60)
    assert names(empty_cache) == ["a"]


def test_without_locks_the_first_to_finish_wins(empty_cache, monkeypatch):
    monkeypatch.setattr("tidaldecode.models.cache._lock", lambda file, wait: None)

    def overtaken(workplace):
        keep(lambda other: make_model(other, '{"first": 1}'))
        return make_model(workplace)

    keep(overtaken)
    assert (empty_cache / "a" / "config.json").read_text() == '{"first": 1}'
    assert names(empty_cache) == ["a"]


def test_an_unfinished_folder_is_made_anew(empty_cache, tmp_path):
    folder = empty_cache / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    complete = tmp_path / "complete"
    complete.mkdir()
    (complete / "config.json").write_text("{}")
    publish(complete, folder)
    assert names(folder) == ["config.json"]
    late = tmp_path / "late"  # another process was faster: its folder stays
    late.mkdir()
    publish(late, folder)
    assert names(folder) == ["config.json"]


@pytest.fixture
def two_models(empty_cache):
    """A cache with a model made from a file, the demo model, and what is the user's."""
    keep()
    (empty_cache / "smollm2-135m").mkdir()
    for name in ("smollm2-135m/config.json", "mine.whl"):
        (empty_cache / name).write_text("{}")
    (empty_cache / "my-model").mkdir()
    (empty_cache / "my-model" / "config.json").write_text("{}")
    (empty_cache / ".b.unfinished" / "work-1").mkdir(parents=True)
    (empty_cache / ".deleted-1" / "c").mkdir(parents=True)
    return empty_cache


def test_the_command_lists_them(two_models, run):
    status, out, err = run("cache", "--json")
    found = json.loads(out)
    assert (status, found["folder"], found["cleared"]) == (0, str(two_models), False)
    assert [(model["name"], model["made_from"]) for model in found["models"]] == [
        ("a", "/somewhere/a.gguf"),
        ("smollm2-135m", None),
    ]
    assert "a, from /somewhere/a.gguf" in err


def test_the_command_deletes_them_and_nothing_of_the_users(two_models, run):
    run("cache", "a", "--clear")
    assert names(two_models) == [".b.unfinished", ".deleted-1", "mine.whl", "my-model", "smollm2-135m"]
    status, out, _ = run("cache", "--clear")
    assert (status, out) == (0, "")
    assert names(two_models) == ["mine.whl", "my-model"]
    assert cached_models() == []


def test_the_command_spares_what_is_being_made(empty_cache, run):
    def look(workplace):
        run("cache", "--clear")
        return make_model(workplace)

    keep(look)
    assert names(empty_cache) == ["a"]


def test_the_command_knows_no_such_model(two_models, run):
    assert_one_line(run("cache", "b", "--clear"), "no model 'b' in", "it holds a, smollm2-135m")


def test_no_cache_is_an_empty_one(empty_cache, run):
    assert json.loads(run("cache", "--json")[1])["models"] == []
    assert_one_line(run("cache", "b"), "it holds no model")
