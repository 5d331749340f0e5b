"""What every command answers to bad input."""

from __future__ import annotations


def assert_one_line(result, *words: str):
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("tidaldecode: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
