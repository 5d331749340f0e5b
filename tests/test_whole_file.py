"""Files that are there whole or not at all, and what is no such file: links, pipes, open files."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tidaldecode import InputError, TidalPlan
from tidaldecode.whole_file import whole_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such files")

PLAN = TidalPlan.paper(4, 2, token_budget=16)


def read_from(pipe: Path) -> tuple[threading.Thread, list[bytes]]:
    """Reads a FIFO until its writer closes it."""
    content: list[bytes] = []
    thread = threading.Thread(target=lambda: content.append(pipe.read_bytes()), daemon=True)
    thread.start()
    return thread, content


def test_a_link_stays_one(tmp_path):
    """Relative links, links to links, and a link to a file that is not there yet."""
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("plans/old.json")
    (tmp_path / "second.json").symlink_to("link.json")
    (tmp_path / "new.json").symlink_to("plans/new.json")
    for name, target in {"second.json": "old.json", "new.json": "new.json"}.items():
        PLAN.save(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert TidalPlan.load(tmp_path / "plans" / target) == PLAN
    assert sorted(os.listdir(tmp_path / "plans")) == ["new.json", "old.json"]


def test_links_in_a_ring(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="can't be written: Too many levels"):
        PLAN.save(tmp_path / "a")


def test_a_pipe_gets_the_text_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader, content = read_from(tmp_path / "pipe")
    PLAN.save(tmp_path / "pipe")
    reader.join(10)
    assert content == [PLAN.to_json().encode()]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_the_open_end_of_a_pipe():
    """What a shell's `>(command)` is."""
    read, write = os.pipe()
    PLAN.save(f"/dev/fd/{write}")
    os.close(write)
    with os.fdopen(read, "rb") as reader:
        assert reader.read() == PLAN.to_json().encode()


def test_standard_output_goes_on_where_it_was(tmp_path, capfd):
    """Also where the shell put it into a file, which must not be replaced or written from its start."""
    before = os.dup(1)
    with (tmp_path / "out.txt").open("wb") as out:
        os.dup2(out.fileno(), 1)
    try:
        os.write(1, b"before\n")
        PLAN.save("/dev/stdout")
        os.write(1, b"after\n")
    finally:
        os.dup2(before, 1)
    assert (tmp_path / "out.txt").read_text() == f"before\n{PLAN.to_json()}after\n"


def test_nobodys_file_is_touched(tmp_path):
    (tmp_path / "plan.json.tmp").write_text("mine")
    PLAN.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"plan\.json can't be written: no room"), whole_file(tmp_path / "plan.json"):
        raise OSError("no room")
    assert (tmp_path / "plan.json.tmp").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["plan.json", "plan.json.tmp"]


def test_of_two_writers_the_last_wins_whole(tmp_path):
    path = tmp_path / "text"
    with whole_file(path) as one:
        one.write_text("one, and much longer than the other")
        with whole_file(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one, and much longer than the other"
    assert os.listdir(tmp_path) == ["text"]


def test_rights_stay(tmp_path):
    path = tmp_path / "text"
    PLAN.save(path)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o600)
    PLAN.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_commands_write_to_streams(tmp_path):
    """`--output -`, a link, a full device and a closed pipe, in a process of its own."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "mine.json").write_text('{"versions": {"python": "3"}, "device": "a chip", "answer": 42}')
    (tmp_path / "page.html").symlink_to("real.html")

    def shell(output: str, rest: str = ""):
        command = f"{sys.executable} -m tidaldecode report {results} --output {output} {rest}"
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)

    whole = shell("page.html")
    page = (tmp_path / "real.html").read_text()
    assert whole.returncode == 0 and (tmp_path / "page.html").is_symlink()
    assert shell("-").stdout == page
    assert shell(">(cat)", "| cat").stdout == page
    assert shell("-", "--json").stderr.startswith("tidaldecode: --output - and --json both write to standard output")
    for rest in ("--json > /dev/full", "--json >&-"):
        failed = shell("x.html", rest)
        assert failed.returncode == 2 and "tidaldecode: standard output" in failed.stderr.splitlines()[-1]
        assert "Traceback" not in failed.stderr and "Exception" not in failed.stderr
    closed = shell("x.html", "--json 2>&-")
    assert closed.returncode == 0 and closed.stdout.startswith('{"output"') and closed.stdout.count("\n") == 1
