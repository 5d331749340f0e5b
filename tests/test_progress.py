"""What a terminal shows while something is measured; nothing where there is none."""

from __future__ import annotations

import io

from rich.console import Console

from tidaldecode.cli.progress import progress


def shown(terminal, *told):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with progress(console) as on_progress:
        for what in told:
            on_progress(*what)
    return console.file.getvalue()


def test_what_is_waited_for_and_then_a_bar():
    """Names may look like markup."""
    text = shown(True, (0, 0, "reading [b]"), (0, 2, "window 1 [b]"), (1, 2, "window 2"), (2, 2, "done"))
    assert text.index("reading [b]") < text.index("window 1 [b]") < text.index("2/2")


def test_words_come_between():
    """Of an answer, behind which something is waited for again."""
    assert shown(True, (0, 0, "reading"), (0, 0, ""), (0, 0, "comparing")).count("comparing") == 1


def test_no_terminal():
    assert shown(False, (0, 0, "reading"), (1, 2, "window")).strip() == ""
