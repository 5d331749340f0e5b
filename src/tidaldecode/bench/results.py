"""A report as a file of results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def save_results(results: dict[str, Any], path: Path) -> None:
    """Writes results as JSON, a line for each row; an existing file stays whole until the new one is complete."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in results["rows"])
    fields = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "rows"]
    text = "{\n" + ",\n".join([*fields, f'  "rows": [\n{rows}\n  ]']) + "\n}\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
