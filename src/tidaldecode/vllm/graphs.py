"""Two CUDA graphs for each number of requests: one that decodes by the plan, and vLLM's own for short sequences.

vLLM chooses the graph of a step by the number of requests, and asks no backend. Its model runner V2 keeps the graphs in
a dictionary; what is put in its place here gives the graph that the step's lengths ask for. Both are captured by vLLM
itself, one after the other, and share their memory. Where a runner keeps its graphs in another way, there is one graph
for each number of requests, which decodes by the plan.
"""

from __future__ import annotations

from typing import Any, Protocol

from vllm.config import CUDAGraphMode


class Chooser(Protocol):
    """Who knows which graph is wanted.

    Attributes:
        captures_own: whether what is captured now is vLLM's own attention.
        wants_own: whether the step at hand is for vLLM's own attention: all its sequences are short.
    """

    captures_own: bool
    wants_own: bool


class Graphs(dict[Any, Any]):
    """The graphs that decode by the plan, by what vLLM calls them; or vLLM's own, while they are wanted."""

    def __init__(self, by_plan: dict[Any, Any], own: dict[Any, Any], chooser: Chooser) -> None:
        super().__init__(by_plan)
        self._own = own
        self._chooser = chooser

    def __getitem__(self, name: Any) -> Any:
        """The graph that is to be replayed."""
        by_plan = super().__getitem__(name)
        return self._own.get(name, by_plan) if self._chooser.wants_own else by_plan

    def clear(self) -> None:
        """Forgets all of them."""
        super().clear()
        self._own.clear()


def capture_both(runner: Any, chooser: Chooser) -> None:
    """Lets a model runner capture each of its full graphs twice, when it comes to that."""
    manager: Any = getattr(runner, "cudagraph_manager", None)
    capture: Any = getattr(manager, "capture", None)
    if not all(hasattr(manager, name) for name in ("graphs", "_capture_descs")) or hasattr(capture, "captures_both"):
        return

    def capture_by_plan_and_own(*args: Any, **kwargs: Any) -> None:
        capture(*args, **kwargs)
        if getattr(manager, "_max_full_descs_to_capture", None) is not None:  # vLLM measures how much memory one takes
            return
        by_plan, all_kinds = manager.graphs, manager._capture_descs
        kinds = {mode: names for mode, names in all_kinds.items() if mode == CUDAGraphMode.FULL}
        manager.graphs, manager._capture_descs, chooser.captures_own = {}, kinds, True
        try:
            capture(*args, **kwargs)
        finally:
            own, manager.graphs = manager.graphs, by_plan
            manager._capture_descs, chooser.captures_own = all_kinds, False
        manager.graphs = Graphs(by_plan, own, chooser)

    capture_by_plan_and_own.captures_both = True  # type: ignore[attr-defined]
    manager.capture = capture_by_plan_and_own
