"""Which CUDA graph is captured, and which is replayed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

from vllm.config import CUDAGraphMode

from tidaldecode.vllm.graphs import capture_both


class _Manager:
    """Captures as model runner V2's does: a graph here is what was captured, and in which turn."""

    def __init__(self, chooser: SimpleNamespace) -> None:
        self.graphs: dict[str, tuple[str, bool]] = {}
        self._capture_descs = {CUDAGraphMode.PIECEWISE: ["8"], CUDAGraphMode.FULL: ["1", "2"]}
        self._max_full_descs_to_capture: int | None = None
        self.captured: list[str] = []
        self._chooser = chooser

    def capture(self, prefix: str) -> None:
        for mode, names in self._capture_descs.items():
            for name in names:
                self.captured.append(name)
                if mode == CUDAGraphMode.FULL:
                    assert name not in self.graphs
                    self.graphs[name] = (prefix + name, self._chooser.captures_own)


def _chooser() -> SimpleNamespace:
    return SimpleNamespace(captures_own=False, wants_own=False)


def test_short_sequences_get_vllms_own_graph():
    chooser = _chooser()
    manager = _Manager(chooser)
    runner = SimpleNamespace(cudagraph_manager=manager)
    capture_both(runner, chooser)
    capture_both(runner, chooser)  # a second time changes nothing
    manager.capture("of ")
    assert manager.captured == ["8", "1", "2", "1", "2"]
    assert not chooser.captures_own
    assert "1" in manager.graphs and list(manager.graphs) == ["1", "2"]
    assert manager.graphs["2"] == ("of 2", False)
    chooser.wants_own = True
    assert manager.graphs["2"] == ("of 2", True)
    manager.graphs.clear()
    assert "2" not in manager.graphs


def test_a_trial_capture_measures_one_graph():
    chooser = _chooser()
    manager = _Manager(chooser)
    manager._max_full_descs_to_capture = 1
    capture_both(SimpleNamespace(cudagraph_manager=manager), chooser)
    manager.capture("")
    assert manager.captured == ["8", "1", "2"]


def test_a_runner_that_keeps_its_graphs_otherwise_stays_as_it_is():
    runner = SimpleNamespace()
    capture_both(runner, _chooser())
    assert vars(runner) == {}


def test_the_other_runner_keeps_its_graphs_so():
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    assert "for mode in [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL]" in inspect.getsource(CudaGraphManager.capture)
    assert "self._max_full_descs_to_capture is not None" in inspect.getsource(CudaGraphManager.capture)
    assert "self.graphs[desc].replay()" in inspect.getsource(CudaGraphManager.run_fullgraph)
