"""The plans that come with the package, one JSON file a model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tidaldecode.errors import InputError
from tidaldecode.plan import TidalPlan


def shipped_plans() -> dict[str, TidalPlan]:
    """The plans that come with the package, by name."""
    files = sorted(file.name for file in resources.files(__name__).iterdir() if file.name.endswith(".json"))
    return {name.removesuffix(".json"): TidalPlan.load(str(resources.files(__name__) / name)) for name in files}


def read_plan(name: str) -> TidalPlan | None:
    """The plan of a name that needs no model to be understood: a file or a shipped plan.

    Returns:
        The plan; `None` for `auto`, `full` and `paper`, which depend on the model.

    Raises:
        InputError: the name is unknown, or the file is wrong.
    """
    if name in ("auto", "full", "paper"):
        return None
    if name.endswith(".json") or Path(name).is_file():
        return TidalPlan.load(name)
    shipped = shipped_plans()
    if name not in shipped:
        raise InputError(f"no plan {name!r}: give a plan file, 'auto', 'full', 'paper' or one of {', '.join(shipped)}")
    return shipped[name]
