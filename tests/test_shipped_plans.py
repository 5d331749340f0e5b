"""The plans that come with the package, against what was published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tidaldecode.plan import Source
from tidaldecode.plans import shipped_plans

MAPS = json.loads((Path(__file__).parent / "data" / "kascade_head_maps.json").read_text())["models"]
KASCADE = {
    "llama-3-1-8b-kascade": "Meta-Llama-3.1-8B-Instruct",
    "deepseek-r1-distill-llama-8b": "DeepSeek-R1-Distill-Llama-8B",
    "qwen3-8b": "Qwen3-8B",
}


@pytest.mark.parametrize("name", KASCADE)
def test_kascades_plans_read_what_its_map_of_heads_says(name):
    """KV head h of a layer reads the set that KV head map[layer][h] of the nearest anchor below chose."""
    plan, published = shipped_plans()[name], MAPS[KASCADE[name]]
    anchors = published["anchors"]
    assert [layer for layer, role in enumerate(plan.roles) if role == "select"] == anchors
    assert (plan.selection, plan.token_budget) == ("per_group", 0.1)
    assert plan.model is not None and plan.model.group_size == 4
    for layer, heads in enumerate(published["map"]):
        if layer in anchors:
            continue
        anchor = max(anchor for anchor in anchors if anchor < layer)
        expected = [Source(layer=anchor, selection="per_group", head=head) for head in heads for _ in range(4)]
        assert plan.sources is not None and list(plan.sources[layer]) == expected
