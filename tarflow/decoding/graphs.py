"""Repeating the same kernels without launching them one by one."""

from collections.abc import Callable

import torch

from tarflow_kernels import dispatch


class Replayed:
    """``run()``, which returns nothing and never waits for the device; on a CUDA device, replayed as a graph.

    What changes from one call to the next, ``run`` reads from and writes to tensors that stay where they are. The first
    calls, in which libraries and compilers set themselves up, run kernel by kernel; then one is captured.
    """

    WARM_UP = 2

    def __init__(self, run: Callable[[], None], device: torch.device):
        self.run = run
        self.on_graph = device.type == "cuda" and dispatch.can_be_captured()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run, or replay."""
        if not self.on_graph:
            self.run()
            return
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self._run_aside()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()
        self.graph.replay()

    def _run_aside(self) -> None:
        """On another stream, as capturing asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
