"""A report as a file of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tidaldecode.whole_file import whole_file


def save_results(results: dict[str, Any], path: Path) -> None:
    """Writes results as JSON, a line for each row; an existing file stays whole until the new one is complete."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in results["rows"])
    fields = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "rows"]
    text = "{\n" + ",\n".join([*fields, f'  "rows": [\n{rows}\n  ]']) + "\n}\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
