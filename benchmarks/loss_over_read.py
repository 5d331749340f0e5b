"""What each method loses over the share of K and V that it reads: a figure and a JSON, of results that are there.

    python benchmarks/loss_over_read.py

SmolLM2-135M, 8,192 tokens. Nothing is measured here; the share of a method follows from its settings and the context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from tidaldecode.methods.method import Method
from tidaldecode.plan import TidalPlan
from tidaldecode.plans import shipped_plans

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLANS = {
    "smollm2-135m": TidalPlan.load(
        str(ROOT / "benchmarks/plans/smollm2-135m-nine-layers.json")
    ),  # shipped as that then
    "smollm2-135m-paper": shipped_plans()["smollm2-135m-paper"],
} | {
    f"smollm2-135m-{name}": TidalPlan.load(str(ROOT / f"benchmarks/plans/smollm2-135m-{name}.json"))
    for name in ("paper-per-group", "paper-unified", "paper-unified-recent")
}
# line of the figure: which rows are its own, the colours on light and dark, and where its name stands
LINES: dict[str, tuple[dict[str, Any], str, str, tuple[float, float]]] = {
    "calibrated plans": ({"method": "calibrated"}, "#0550ae", "#79c0ff", (0.222, 0.0152)),
    "the paper's layers": ({"method": "tidal", "plan": "smollm2-135m-paper"}, "#8250df", "#d2a8ff", (0.2, 0.6)),
    "Quest": ({"method": "quest", "full_layers": 2}, "#bc4c00", "#ffa657", (0.14, 1.32)),
    "StreamingLLM": ({"method": "streaming"}, "#1a7f37", "#56d364", (0.0085, 0.72)),
    "oracle, per head": (
        {"method": "oracle", "selection": "per_head", "full_layers": 2},
        "#6e7781",
        "#8b949e",
        (0.145, 0.0042),
    ),
}


def main() -> None:
    """Writes `benchmarks/results/loss_over_read_smollm2-135m.json` and `docs/figures/loss-{light,dark}.svg`."""
    rows = [*_compared("smollm2-135m_h200/ppl.json"), *_compared("smollm2-135m_h100/ppl.json"), *_calibrated()]
    about = {"command": "python benchmarks/loss_over_read.py", "model": "smollm2-135m", "context": 8192}
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    target = RESULTS / "loss_over_read_smollm2-135m.json"
    target.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    for index, theme in enumerate(("light", "dark")):
        _draw(rows, index, ROOT / "docs" / "figures" / f"loss-{theme}.svg")


def _compared(file: str) -> Iterator[dict[str, Any]]:
    """The rows of `tidaldecode eval ppl`, all on the same windows."""
    result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    shape = PLANS["smollm2-135m"].model
    assert shape is not None
    for row in result["rows"]:
        settings = {name: row[name] for name in ("selection", "page_size", "full_layers") if row[name] is not None}
        method = Method.named(row["method"], row["budget"], PLANS.get(row["plan"]), **settings)
        assert method.key()["plan_digest"] == row["plan_digest"], f"{row['plan']} is no longer what was measured"
        share = method.attention(shape, result["context"]).kv_read_fraction(result["context"])
        kept = {name: row[name] for name in ("method", "plan", "selection", "full_layers", "budget", "windows")}
        yield kept | _point(share, row["gap"], row["gap_stderr"], file)


def _calibrated() -> Iterator[dict[str, Any]]:
    """The best plans of `tidaldecode calibrate --max-gap`, on the half of the essays that they were not found on."""
    file = "calibration_smollm2-135m_h100/largest_gap/calibration.json"
    result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    for row in result["frontier"]:
        kept = {"method": "calibrated", "select_layers": row["select_layers"], "budget": row["token_budget"]}
        kept["windows"] = result["heldout_windows"]
        yield kept | _point(row["kv_read_fraction"], row["heldout_gap"], row["heldout_error"], file)


def _point(share: float, gap: float, error: float, file: str) -> dict[str, Any]:
    return {"kv_read_fraction": round(share, 5), "gap": round(gap, 5), "gap_stderr": round(error, 5), "file": file}


def _draw(rows: list[dict[str, Any]], theme: int, target: Path) -> None:
    ink, grid = (("#1f2328", "#d1d9e0"), ("#e6edf3", "#30363d"))[theme]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "loss", "font.family": "sans-serif", "font.size": 11}
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink) | {
        "axes.edgecolor": grid
    }
    with pyplot.rc_context(settings | colors):
        figure, axes = pyplot.subplots(figsize=(8, 4.3), layout="constrained")
        for name, (own, *line_colors, place) in LINES.items():
            points = [row for row in rows if all(row.get(key) == value for key, value in own.items())]
            _line(axes, points, name, line_colors[theme], place)
        axes.set(xscale="log", yscale="log", xlim=(0.007, 0.6), ylim=(0.0022, 2))
        axes.set_xlabel("share of K and V that a decode step reads")
        axes.set_ylabel("nats per token above full attention")
        axes.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %"], minor=False)
        axes.set_yticks([0.003, 0.01, 0.03, 0.1, 0.3, 1], ["0.003", "0.01", "0.03", "0.1", "0.3", "1"])
        axes.minorticks_off()
        axes.grid(color=grid, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(target, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def _line(axes: Axes, points: list[dict[str, Any]], name: str, color: str, place: tuple[float, float]) -> None:
    shares = [row["kv_read_fraction"] for row in points]
    style = ":" if name.startswith("oracle") else "-"
    errors = [row["gap_stderr"] for row in points]
    axes.errorbar(
        shares, [row["gap"] for row in points], errors, color=color, marker="o", markersize=4, linestyle=style,
        linewidth=2 if name.startswith("calibrated") else 1.4, elinewidth=0.8,
    )  # fmt: skip
    axes.text(*place, name, color=color, fontweight="bold" if name.startswith("calibrated") else "normal")


if __name__ == "__main__":
    main()
