"""Two ranks of tensor parallelism answer as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from engines import CODED, CROSSING, greedy, tiny_plan, with_plan

PROMPTS = [list(range(2 + shift, 202 + shift)) for shift in (0, 7, 31)]

ASK = """
import json, sys
from engines import greedy
from vllm import LLM

if __name__ == "__main__":
    model, prompts, options = json.loads(sys.stdin.read())
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=1024, tensor_parallel_size=2, **options)
    print("ANSWERS", json.dumps(greedy(engine, prompts, 24)))
"""


def _on_two_ranks(tmp_path: Path, *question: object) -> list[list[int]]:
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    command = [sys.executable, str(script)]
    changes = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))),
    }
    result = subprocess.run(
        command, input=json.dumps(question), capture_output=True, text=True, env=dict(os.environ) | changes, timeout=300
    )
    answers = [line for line in result.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert answers, result.stdout[-5000:]
    return json.loads(answers[0].removeprefix("ANSWERS "))


def test_two_ranks_answer_as_one(start, tiny_llama, tmp_path):
    options = with_plan(tiny_plan(tmp_path, 32, "per_head", CROSSING, CODED)) | {"kv_cache_memory_bytes": 2**28}
    answers = _on_two_ranks(tmp_path, str(tiny_llama), PROMPTS, options)
    assert answers == greedy(start(tiny_llama, **options), PROMPTS, 24)
