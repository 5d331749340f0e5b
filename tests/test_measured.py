"""Figures of a generation: which tokens' times count."""

from __future__ import annotations

import pytest
from transformers import TextStreamer

from tidaldecode.evaluate.generation import _TimedStreamer
from tidaldecode.evaluate.generation_settings import Passes
from tidaldecode.hf.second_pass import Rounds


def streamer(times):
    timed = _TimedStreamer(None, lambda text: None)
    assert isinstance(timed, TextStreamer)
    timed._times = times
    return timed


# the prompt's token at 0 s; rounds of 2 and 1 tokens that are compiled, of 2, of 4 (compiled), 2 and 4
TIMES = [0.0, 50.0, 50.0, 90.0, 90.1, 90.1, 120.0, 120.0, 120.0, 120.0, 120.2, 120.2, 120.5, 120.5, 120.5, 120.5]
ROUNDS = Rounds(drafted=[1, 2, 1, 8, 1, 8], sequences=[1] * 6, tokens=[2, 1, 2, 4, 2, 4])


def test_rounds_whose_pass_is_compiled_are_left_out():
    """Of every number of drafted tokens the first: `auto` goes from one to another."""
    ms = streamer(TIMES).ms(Passes(lossless="auto"), ROUNDS, compiled=1)
    assert ms == pytest.approx((0.1 + 0.2 + 0.3) * 1000 / (2 + 2 + 4))


def test_on_a_cpu_every_round_counts():
    assert streamer(TIMES).ms(Passes(lossless="auto"), ROUNDS, compiled=0) == pytest.approx(120.5 * 1000 / 15)


def test_a_round_that_an_end_of_sequence_cut():
    ended = Rounds(drafted=[3, 3], sequences=[1, 1], tokens=[4, 4])
    times = [0.0, 9.0, 9.0, 9.0, 9.0, 9.4, 9.4]
    assert streamer(times).ms(Passes(lossless=3), ended, compiled=1) == pytest.approx(200)
    assert streamer([0.0, 9.0]).ms(Passes(lossless=3), Rounds([3], [1], [4]), compiled=1) is None


def test_steps_and_corrections():
    assert streamer([0.0, 30.0, 30.2, 30.4, 31.0]).ms(Passes(), None, compiled=1) == pytest.approx(200)
    corrected = Passes(correction_interval=2)
    assert streamer([0.0, 30.0, 60.0, 60.1, 60.5]).ms(corrected, None, compiled=1) == pytest.approx(250)
