"""Work that a decoder repeats, as a CUDA graph: captured once, then replayed without launching its kernels one by one.

A graph holds addresses. What is in this table stays where it is while the graph lives, and is made before; everything
else lies in the graph's own pool, which is free again when a pass ends.

    ============== ============================================ ============================================
                   sequential                                   Jacobi
    ============== ============================================ ============================================
    captured       the step of every chain, once per block      a pass over the windows, and again whenever
                                                                rows have left the batch
    only read      weights, class context, temperatures, z      the same
    updated        x, h, cache, qkv, hidden layer, positions,   x, cache, qkv, hidden layer, positions,
                   tickets                                      accepted tokens
    ============== ============================================ ============================================

Bytes, for L layers of width C, R rows, windows of G tokens (one in the sequential decoder), and s bytes per element of
the layers, f of the tokens:

    ============== =================================================================================================
    weights        ``12 L C^2 s``, once for all chains
    cache          ``2 L R N C s``
    buffers        ``7 R G C s`` for qkv and the hidden layer, and ``R G C f`` for h of the sequential decoder
    pool           ``4 R G C s``, ``R G C f`` more where a pass embeds its tokens anew (Jacobi, mixtures), and
                   ``4 S R G C`` where few rows and heads have their cache cut in S splits; from 2 MB on, per stream
    ============== =================================================================================================

How the rules of capture are kept:

- *Nothing is set up inside.* The first calls run on the streams that capture later, so that kernels are compiled and
  libraries have their workspaces, of which they keep one for every stream.
- *Nothing waits for the device*, and no pass draws random numbers, for which a generator would have to be registered.
- *Any stream may call.* The work begins after what the caller's stream holds, and that stream goes on after it.
- *Other threads go on.* Their work is not captured and does not disturb. Two threads of ours capture in turn: PyTorch
  allows one capture at a time. A thread that synchronizes the whole device meanwhile gets an error, as CUDA has it.
- *Errors leave nothing behind.* Where a pass raises, all streams are joined and the caller's is current again; the next
  call captures anew. (After a call that CUDA forbids in a capture, PyTorch's allocator would stay in it. There is none
  in a pass, and the reference, which reads positions, is never captured.)
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from tarflow_kernels import dispatch

__all__ = ["GraphMemory", "GraphRunner", "side_streams"]

_one_at_a_time = threading.Lock()


class GraphMemory:
    """The memory of graphs that are captured in turn, such as those of all blocks of a flow: one pool for all.

    A graph may be replayed until the next is captured. The last one is kept, since a pool whose last graph is gone must
    not be captured into; with this object it goes too, and the pool is PyTorch's to free.
    """

    def __init__(self) -> None:
        self.last: torch.cuda.CUDAGraph | None = None

    def capture(self, run: Callable[[], None], stream: "torch.cuda.Stream") -> "torch.cuda.CUDAGraph":
        """Capture what ``run`` launches on this stream."""
        graph, pool = torch.cuda.CUDAGraph(), None if self.last is None else self.last.pool()
        # Where a capture ends in an error, PyTorch (up to 2.13) leaves its stream the current one.
        caller = torch.cuda.stream(torch.cuda.current_stream(stream.device))
        with _one_at_a_time, caller, torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            run()
        self.last = graph
        return graph


class GraphRunner:
    """``runner(*runs)`` calls functions that return nothing and never wait for the device; on CUDA, as one graph.

    They are the same every time, and whatever changes from one call to the next is in tensors that stay where they are.
    Two of them, neither of which touches what the other writes, run side by side, on streams of their own. The first
    calls, in which libraries and compilers set themselves up, run kernel by kernel; then one is captured. No reference
    to ``runs`` is kept, so that their owner may hold this object.

    Args:
        device: where they run.
        memory: that of the graphs before and after this one, if there are any.
    """

    WARM_UP = 2

    def __init__(self, device: torch.device, memory: GraphMemory | None = None):
        self.device = device
        self.memory = GraphMemory() if memory is None else memory
        self.on_graph = device.type == "cuda" and dispatch.can_be_captured()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *runs: Callable[[], None]) -> None:
        """Call ``runs``, or replay them."""
        if not self.on_graph:
            for run in runs:
                run()
        elif self.graph is None:
            self._launch_or_capture(runs)
        else:
            self.graph.replay()

    def _launch_or_capture(self, runs: Sequence[Callable[[], None]]) -> None:
        streams = side_streams(self.device, threading.get_ident())
        launch = functools.partial(_run_side_by_side, runs, streams)
        self.calls += 1
        if self.calls > self.WARM_UP:
            self.graph = self.memory.capture(launch, streams[0])
            self.graph.replay()
            return
        with _forked(streams[0], torch.cuda.current_stream(self.device)):
            launch()


@functools.cache
def side_streams(device: torch.device, thread: int) -> "tuple[torch.cuda.Stream, torch.cuda.Stream]":
    """Return the two streams on which a thread warms up and captures, always the same: libraries keep workspaces."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _run_side_by_side(runs: Sequence[Callable[[], None]], streams: "Sequence[torch.cuda.Stream]") -> None:
    """Call each on a stream of its own; those behind the first begin after what it holds, and it goes on after them."""
    first, *others = streams[: len(runs)]
    with contextlib.ExitStack() as joined:
        for stream in others:
            joined.enter_context(_forked(stream, first))
        for run, stream in zip(runs, (first, *others), strict=True):
            with torch.cuda.stream(stream):
                run()


@contextlib.contextmanager
def _forked(stream: "torch.cuda.Stream", origin: "torch.cuda.Stream") -> Iterator[None]:
    """Let a stream begin after what its origin holds now, and the origin go on after what the stream holds at last."""
    stream.wait_stream(origin)
    try:
        yield
    finally:
        origin.wait_stream(stream)
