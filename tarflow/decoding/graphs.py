"""Repeating the same kernels without launching them one by one."""

import functools
import threading
from collections.abc import Callable

import torch

from tarflow_kernels import dispatch


class Replayed:
    """``replayed(run)`` calls ``run``, which returns nothing and never waits for the device; on CUDA, as a graph.

    It is the same ``run`` every time, and what changes from one call to the next it reads from and writes to tensors
    that stay where they are. The first calls, in which libraries and compilers set themselves up, run kernel by kernel;
    then one is captured. No reference to ``run`` is kept, so that what it belongs to may hold this.
    """

    WARM_UP = 2

    def __init__(self, device: torch.device):
        self.device = device
        self.on_graph = device.type == "cuda" and dispatch.can_be_captured()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[[], None]) -> None:
        """Run, or replay."""
        if not self.on_graph:
            run()
            return
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self._run_aside(run)
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile is no part of it, and none of its concern.
            with torch.cuda.graph(graph, stream=_aside(self.device), capture_error_mode="thread_local"):
                run()
            self.graph = graph
        self.graph.replay()

    def _run_aside(self, run: Callable[[], None]) -> None:
        """On another stream, as capturing asks for."""
        stream, current = _aside(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)


def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which this thread warms up and captures: libraries keep a workspace for every stream they see."""
    return _stream(device, threading.get_ident())


@functools.cache
def _stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
