"""Decoded tokens run again with full attention: cache correction, and lossless decoding by the same pass."""

from tidaldecode.hf.second_pass.correction import check_second_pass, correct, full_pass, step_decoded
from tidaldecode.hf.second_pass.lossless import lossless_loop
from tidaldecode.hf.second_pass.speculation import DraftLength, Lossless
from tidaldecode.hf.session import Correction, Rounds

__all__ = [
    "Correction",
    "DraftLength",
    "Lossless",
    "Rounds",
    "check_second_pass",
    "correct",
    "full_pass",
    "lossless_loop",
    "step_decoded",
]
