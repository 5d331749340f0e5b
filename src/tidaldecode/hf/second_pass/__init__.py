"""Decoded tokens run again with full attention: cache correction, and lossless decoding by the same pass."""

from tidaldecode.hf.rounds import Pace, Rounds
from tidaldecode.hf.second_pass.correction import check_second_pass, correct, full_pass, step_decoded
from tidaldecode.hf.second_pass.draft_length import DraftLength, Lossless
from tidaldecode.hf.second_pass.lossless import lossless_loop
from tidaldecode.hf.session import Correction

__all__ = [
    "Correction",
    "DraftLength",
    "Lossless",
    "Pace",
    "Rounds",
    "check_second_pass",
    "correct",
    "full_pass",
    "lossless_loop",
    "step_decoded",
]
