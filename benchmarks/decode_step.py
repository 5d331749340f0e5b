"""A decode step of the demo model at about 7,500 tokens, by the shipped plan and by full attention, in one run.

    python benchmarks/decode_step.py > benchmarks/results/decode_step_smollm2-135m.json

The document is the demo's, with its first part once more behind it; `tidaldecode generate --compare` does the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "examples" / "moby_dick_101-103.txt"
GENERATE = ["generate", "--compare", "--json", "--budget", "256", "--max-new-tokens", "128"]
QUESTION = ["--question", "Write a long summary of this text."]


def main() -> None:
    """Prints one JSON object: that of `generate`, with the command that made it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "tidaldecode", *GENERATE, *QUESTION]
    run = subprocess.run(command, input=text + text[:4650], stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(run.stdout)
    answer["command"] = f"python benchmarks/{Path(__file__).name} ({answer['command']})"
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
