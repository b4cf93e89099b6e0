"""Passes on a GPU without a GPU: the order of streams, what graphs hold, and whose memory they live in."""

import contextlib
import functools
import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import branches, draw, randomize
from tarflow import Decoder, Guidance, TokenFlow
from tarflow.decoding.step import DecodingMemory, GraphRunner, side_streams
from tarflow_kernels import dispatch

CUDA = torch.device("cuda", 0)


class Card:
    """A GPU with streams, graphs and pools that computes nothing, and notes what each launch waits for.

    It refuses what CUDA and PyTorch refuse: a capture beside another, one that waits for work outside of it, one whose
    streams are not joined, one into a pool whose last graph is gone.
    """

    def __init__(self, monkeypatch):
        self.launches = []  # of each its name, its stream, and the launches that it waits for
        self.graphs, self.pools = [], []  # of each capture, the graph and its pool
        self.capturing, self.invalid = None, False
        self.local, self.streams = threading.local(), []
        self.caller = self.Stream()
        for name in ("Stream", "CUDAGraph", "stream", "current_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device=None):
        self.streams.append(Stream())
        return self.streams[-1]

    def CUDAGraph(self):
        return Graph(self)

    def current_stream(self, device=None):
        return getattr(self.local, "stream", self.caller)

    @contextlib.contextmanager
    def stream(self, stream):
        previous, self.local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.local.stream = previous

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert self.capturing is None, "one capture at a time"
        assert capture_error_mode == "thread_local"
        assert pool is None or pool in {other.pool() for other in self.living()}, "a pool whose last graph is gone"
        graph.id = len(self.pools) if pool is None else pool
        self.graphs.append(weakref.ref(graph))
        self.pools.append(graph.id)
        previous, self.local.stream = self.current_stream(), stream
        self.capturing, stream.captured = graph, frozenset()
        try:
            yield
        finally:
            joined, self.capturing = stream.captured, None
            for each in self.streams:
                each.captured = None
            if self.invalid or joined != frozenset(range(len(graph.nodes))):
                raise RuntimeError("the capture is invalid")  # and the stream stays, as in PyTorch
            self.local.stream = previous

    def living(self):
        return [graph() for graph in self.graphs if graph() is not None]

    def launch(self, name):
        stream = self.current_stream()
        if stream.captured is None:
            self.launches.append((name, stream, stream.held))
            stream.held |= {len(self.launches) - 1}
        else:
            nodes = self.capturing.nodes
            nodes.append((name, stream, stream.captured))
            stream.captured |= {len(nodes) - 1}


class Stream:
    """What a stream holds: numbers of launches, or, while it is captured, of nodes of the graph."""

    device = CUDA

    def __init__(self):
        self.held, self.captured = frozenset(), None

    def wait_stream(self, other):
        if other.captured is not None:
            self.captured = (self.captured or frozenset()) | other.captured
        else:
            assert self.captured is None, "a capture that waits for work outside of it"
            self.held |= other.held


class Graph:
    def __init__(self, card):
        self.card, self.nodes, self.id = card, [], None

    def pool(self):
        return self.id

    def replay(self):
        stream, launches = self.card.current_stream(), self.card.launches
        held, first = stream.held, len(launches)
        for name, captured_on, waits in self.nodes:
            launches.append((name, captured_on, held | {first + node for node in waits}))
        stream.held |= set(range(first, len(launches)))


@pytest.fixture
def card(monkeypatch):
    side_streams.cache_clear()
    yield Card(monkeypatch)
    side_streams.cache_clear()


@pytest.mark.parametrize("calls", [1, 2, 3, 7])
def test_a_graph_is_captured_once_the_device_is_warm(card, calls):
    """What is captured is not run: in all there are as many launches as calls."""
    runner, ran = GraphRunner(CUDA), []
    for _ in range(calls):
        runner(lambda: ran.append(card.launch("pass")))
    assert len(card.launches) == calls
    assert len(ran) == min(calls, 3)
    assert len(card.graphs) == (calls > 2)


@pytest.mark.parametrize("names", [("first",), ("first", "second")], ids=len)
def test_a_call_begins_after_what_the_caller_launched_and_ends_before_what_follows(card, names):
    """Whether it is launched or replayed; two runs of one call wait for the same, and not for each other."""
    runner = GraphRunner(CUDA)
    for _ in range(6):
        card.launch("caller")
        runner(*(functools.partial(card.launch, name) for name in names))
    in_order = [card.launches[i : i + 1 + len(names)] for i in range(0, len(card.launches), 1 + len(names))]
    done = set()
    for (caller, _, waits), *runs in in_order:
        assert (caller, waits) == ("caller", done)
        done.add(len(done))
        assert [(name, waits) for name, _, waits in runs] == [(name, done) for name in names]
        assert len({stream for _, stream, _ in runs}) == len(names), "each has a stream of its own"
        done |= set(range(len(done), len(done) + len(names)))


def test_a_caller_may_be_on_any_stream(card):
    runner, stream = GraphRunner(CUDA), card.Stream()
    with card.stream(stream):
        for calls in range(4):
            card.launch("caller")
            runner(functools.partial(card.launch, "pass"))
            assert card.current_stream() is stream
            assert stream.held == set(range(2 * calls + 2))
    assert not card.caller.held


def test_a_thread_warms_up_and_captures_on_the_same_streams(card):
    """Libraries keep a workspace for every stream that they see."""

    def streams_used():
        for _ in range(2):
            runner = GraphRunner(CUDA)
            for _ in range(4):
                runner(functools.partial(card.launch, "first"), functools.partial(card.launch, "second"))
        return {stream for _, stream, _ in card.launches}

    assert len(streams_used()) == 2
    other = threading.Thread(target=streams_used)
    other.start()
    other.join()
    assert len({stream for _, stream, _ in card.launches}) == 4


# Memory ---------------------------------------------------------------------------------------------------------------


def capture(card, memory):
    runner = GraphRunner(CUDA, memory)
    for _ in range(3):
        runner(functools.partial(card.launch, "pass"))
    return runner.graph.pool()


def test_graphs_in_turn_share_a_pool_that_is_released_with_their_memory(card):
    memory = DecodingMemory()
    assert capture(card, memory) == capture(card, memory) == capture(card, memory)
    assert len(card.living()) == 1
    del memory
    assert not card.living()


def test_graphs_that_have_nothing_to_do_with_each_other_share_nothing(card):
    assert capture(card, None) != capture(card, None)
    assert not card.living()


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1], ids=["first run", "second run"])
@pytest.mark.parametrize("call", [1, 3], ids=["launched", "captured"])
def test_a_run_that_raises_leaves_streams_joined_and_the_runner_usable(card, call, failing):
    runner, ran = GraphRunner(CUDA), itertools.count(1)

    def run(number):
        card.launch("before")
        if number == failing and next(ran) == call:
            raise ZeroDivisionError
        card.launch("after")

    runs = [functools.partial(run, number) for number in (0, 1)]
    for _ in range(call - 1):
        runner(*runs)
    with pytest.raises(ZeroDivisionError):
        runner(*runs)
    assert card.current_stream() is card.caller
    assert card.caller.held == set(range(len(card.launches)))
    launched = len(card.launches)
    for _ in range(4):
        runner(*runs)
    assert len(card.launches) == launched + 4 * 4
    assert runner.graph is not None


def test_a_capture_that_cuda_ends_leaves_the_callers_stream_the_current_one(card):
    runner, memory = GraphRunner(CUDA), DecodingMemory()
    pool = capture(card, memory)
    card.invalid = True
    with pytest.raises(RuntimeError, match="invalid"):
        capture(card, memory)
    assert card.current_stream() is card.caller
    card.invalid = False
    assert capture(card, memory) == pool
    runner(functools.partial(card.launch, "pass"))


def test_threads_capture_in_turn(card):
    waiting, runner = [], GraphRunner(CUDA)

    def start_another():
        if card.capturing is not None and not waiting:
            waiting.append(threading.Thread(target=capture, args=(card, None)))
            waiting[0].start()
            waiting[0].join(0.3)
            assert waiting[0].is_alive()
            assert len(card.launches) == 2, "it is warm, and waits to capture"

    for _ in range(3):
        runner(start_another)
    waiting[0].join()
    assert len(card.graphs) == 2


# Decoders -------------------------------------------------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """A graph on a CPU: the operators that ran, with the tensors that they had; our ops are one each.

    Capturing runs them, so that the first replay need not.
    """

    def __init__(self):
        super().__init__()
        self.nodes, self.id = [], None
        self.calls, self.inside, self.replays = [], False, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.call(functools.partial(op, *args, **(kwargs or {})))

    def call(self, run):
        if self.inside:
            return run()
        self.inside = True
        results = run()
        self.inside = False
        self.calls.append((run, tree_leaves(results)))
        return results

    def replay(self):
        self.replays += 1
        for run, results in self.calls if self.replays > 1 else ():
            for old, new in zip(results, tree_leaves(run()), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self):
        return self.id


@pytest.fixture
def captured_on_a_cpu(monkeypatch, card):
    """Passes are captured on a CPU, with all that they are given: what is no tensor stays what it was."""
    current = []

    @contextlib.contextmanager
    def record(graph, *args, **options):
        current.append(graph)
        with card.graph(graph, *args, **options), graph:
            yield
        current.pop()

    def on_graph(runner, device, memory=None):
        make_runner(runner, CUDA, memory)

    def as_one(op):
        return lambda *args: current[-1].call(functools.partial(op, *args)) if current else op(*args)

    make_runner = GraphRunner.__init__
    monkeypatch.setattr(GraphRunner, "__init__", on_graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)
    for op in ("residual_norm", "decode_attention", "embed_next", "mixture_logistic", "mixture_logistic_inverse"):
        monkeypatch.setitem(dispatch.implementations[op], "torch", as_one(dispatch.implementations[op]["torch"]))
    return card


def token_flow(**options):
    flow = TokenFlow(13, 2, 16, 3, 2, head_dim=8, num_classes=3, **options)
    return randomize(flow).double().requires_grad_(False)


every_decoder = pytest.mark.parametrize(
    "decoder", [Decoder("sequential"), Decoder("jacobi", 5, 0.0), Decoder("jacobi", tolerance=0.0)], ids=str
)


@pytest.mark.parametrize("chains", [1, 2])
@every_decoder
@pytest.mark.parametrize("guidance", [None, Guidance(1.5, temperature=1.2)], ids=["unguided", "guided"])
@pytest.mark.parametrize("options", [{}, {"coupling": "mixture", "num_mixtures": 3}], ids=["affine", "mixture"])
def test_a_pass_is_the_same_when_it_is_replayed(monkeypatch, request, options, guidance, decoder, chains):
    """All that changes from one pass to the next is in tensors that stay where they are."""
    flow, z, labels = token_flow(**options), draw(0, 5, 13, 2), torch.arange(5) % 3 - 1
    expected = flow.inverse(z, labels, guidance, decoder)
    card, replays, replay = request.getfixturevalue("captured_on_a_cpu"), [], Recording.replay
    monkeypatch.setattr(Recording, "replay", lambda graph: replays.append(len(card.graphs)) or replay(graph))
    monkeypatch.setattr("tarflow.decoding.sequential.count_chains", lambda *sizes: chains)
    assert_close(flow.inverse(z, labels, guidance, decoder), expected, atol=1e-10, rtol=1e-10)
    assert max(replays.count(graph) for graph in replays) > 3


@every_decoder
def test_the_blocks_of_a_flow_share_a_pool_and_leave_no_graph(captured_on_a_cpu, decoder):
    flow, z, labels, card = token_flow(), draw(0, 5, 13, 2), torch.arange(5) % 3, captured_on_a_cpu
    gc.disable()
    try:
        flow.inverse(z, labels, Guidance(1.0), decoder)
        assert len(card.graphs) >= len(flow.blocks)
        assert len(set(card.pools)) == 1
        for block in flow.blocks:
            block.inverse(z, branches(flow, z, labels), None, decoder)
        assert len(set(card.pools)) == 1 + len(flow.blocks)
        assert not card.living()
    finally:
        gc.enable()
