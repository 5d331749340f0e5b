"""The bars of vLLM on a GPU, each answered from the result file that holds it.

    python benchmarks/vllm_bars.py --serve vllm_serve.json --output benchmarks/results/bars/vllm-gpu.json

More rows with `--two-gpus vllm_serve_2_gpus.json`, and with `--selection-us 12.3 --selection-file ops.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tidaldecode.whole_file import whole_file

SERVE = (
    ("decode step, Llama-3-8B shape, 12 x 32K, budget 1,024: vLLM over ours", 2.2, 2.6, "decode step: "),
    ("the same, one request of 100K", 1.4, 1.55, "decode step, long: "),
    ("a step with an 8K-token chunk and 11 decoding requests of 32K: ours over vLLM's", 1.02, 0.97, "mixed step: "),
    ("the 12 requests, 64 tokens, token for token: vLLM over ours", 1.5, 2.0, "batch by token: "),
    ("cached documents, 24 requests of 32K: output tokens per second over vLLM's", 1.9, 2.3, "questions, "),
    ("64 chats of 500 tokens, 200 new: output tokens per second over vLLM's", 0.97, 1.0, "chats, "),
    ("a step at --max-model-len 131,072 over 4,096, 64 requests of 2K", 1.1, 1.02, "middle step: --max-model-len"),
)
"""Rows that `vllm_serve.py` measures: the row, its bar and aim, and how the name of its ratio begins."""

SELECTION = ("selection of 1,024 of 32K for 12 sequences, unified, beyond attention, us", 30.0, 15.0)
TWO_GPUS = ("two GPUs over one, 12 x 32K decode step", 1.6, 1.8)


def answer(row: str, bar: float, aim: float, value: float | None, source: Path | None) -> dict[str, Any]:
    """One row; less is better where the aim is below the bar."""
    result = {"row": row, "bar": bar, "aim": aim, "value": value}
    if value is None or source is None:
        return result | {"met": False, "device": None, "command": None, "why": "not measured"}
    met = value <= bar if aim < bar else value >= bar
    measured = json.loads(source.read_text())
    return result | {
        "met": met,
        "device": measured["device"],
        "command": measured["command"],
        "file": f"benchmarks/results/{source.name}",
    }


def decode_ms(path: Path) -> float | None:
    """TidalDecode's decode step in a result of `vllm_serve.py`."""
    rows = json.loads(path.read_text())["rows"]
    found = [row["ms"] for row in rows if row["row"] == "decode" and row["engine"] == "tidaldecode"]
    return found[0] if found else None


def main() -> None:
    """Reads the result files, and writes the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=Path, required=True)
    parser.add_argument("--two-gpus", type=Path)
    parser.add_argument("--selection-us", type=float)
    parser.add_argument("--selection-file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    ratios = json.loads(options.serve.read_text())["ratios"]
    bars = []
    for row, bar, aim, begins in SERVE:
        value = next((ratio for name, ratio in ratios.items() if name.startswith(begins)), None)
        bars.append(answer(row, bar, aim, value, options.serve))
    bars.append(answer(*SELECTION, options.selection_us, options.selection_file))
    one, two = decode_ms(options.serve), decode_ms(options.two_gpus) if options.two_gpus else None
    bars.append(answer(*TWO_GPUS, one / two if one and two else None, options.two_gpus))
    with whole_file(options.output) as temporary:
        temporary.write_text(json.dumps(bars, indent=1) + "\n")
    for bar in bars:
        print(bar["row"], bar["value"], "met" if bar["met"] else "not met")


if __name__ == "__main__":
    main()
