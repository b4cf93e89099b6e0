"""The choice of backend: by the device or by name, in its thread, under the compiler, in a CUDA graph."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from op_cases import MIXTURE, every_op, inputs_of
from tarflow.decoding.step import GraphRunner
from tarflow_kernels import affine_forward, dispatch, mixture_logistic, use_backend

pytestmark = pytest.mark.usefixtures("on_device")


def test_a_compiler_meets_the_registered_op_unless_a_backend_is_forced():
    seen = []

    def look(graph, _):
        seen.append(torch.ops.tarflow.affine_forward.default in [node.target for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(lambda x: affine_forward(x, x, x)[0], backend=look)
    compiled(torch.ones(2, 3))
    with use_backend("reference"):
        compiled(torch.ones(2, 3))
    assert seen == [True, False]


def test_a_kernel_is_launched_on_the_device_of_its_first_tensor(monkeypatch):
    current = []

    class DeviceOf:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            current.append(self.tensor)

        def __exit__(self, *_):
            current.pop()

    kernels = SimpleNamespace(double=lambda x, y: (current[-1] is x, x + y))
    monkeypatch.setitem(sys.modules, "tarflow_kernels.triton.doubles", kernels)
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    assert dispatch.launcher("doubles", "double")(torch.ones(()), 1) == (True, 2)
    assert current == []


@every_op
def test_an_op_without_a_triton_kernel_says_so(op, shapes, monkeypatch):
    for implementations in dispatch.implementations.values():
        monkeypatch.delitem(implementations, "triton", raising=False)
    with use_backend("triton"), pytest.raises(NotImplementedError, match=r"^\w+ has no triton implementation; it has"):
        op(*inputs_of(shapes, requires_grad=False))


def test_a_backend_holds_until_its_block_ends_even_by_an_error(monkeypatch):
    ran = []
    for name in ("torch", "reference"):
        monkeypatch.setitem(dispatch.implementations["affine_forward"], name, lambda *_, name=name: ran.append(name))

    def fail():
        affine_forward(x, x, x)
        raise KeyError

    x = torch.zeros(1, 1, device="cpu")
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("torch"):
            fail()
        affine_forward(x, x, x)
    affine_forward(x, x, x)
    assert ran == ["torch", "reference", "torch"]


def test_a_backend_is_that_of_its_thread():
    """Blocks that overlap in time neither see nor leave behind each other's choice."""
    seen, entered, left = {}, threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def work(name):
        with use_backend(name):
            entered.wait()
            seen[name] = dispatch.chosen()
            left.wait()
        seen[name, "after"] = dispatch.chosen()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "torch")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"reference": "reference", "torch": "torch", ("reference", "after"): None, ("torch", "after"): None}
    assert dispatch.chosen() is None


def run_aside(function):
    """Call a function on another thread, and return its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_compiled_code_is_that_of_the_thread_that_runs_it():
    def op(x):
        return x + (1 if dispatch.chosen() is None else 2)

    compiled = torch.compile(op, fullgraph=True, backend="eager")
    zero = torch.zeros((), device="cpu")
    assert compiled(zero) == 1
    with use_backend("reference"):
        assert compiled(zero) == 2
        assert run_aside(lambda: compiled(zero)) == 1
    assert compiled(zero) == 1


def test_a_backward_pass_on_another_thread_is_that_of_the_backend_that_ran(monkeypatch):
    """The same holds where the forward pass is run again there."""
    ran = []
    for name, run in dispatch.implementations["mixture_logistic"].items():
        monkeypatch.setitem(
            dispatch.implementations["mixture_logistic"],
            name,
            lambda *args, name=name, run=run: ran.append(name) or run(*args),
        )
    inputs = inputs_of(MIXTURE)
    options = {"use_reentrant": False, "context_fn": lambda: (use_backend("reference"), use_backend("reference"))}
    loss = sum(t.sum() for t in checkpoint(mixture_logistic, *inputs, **options))
    gradients = run_aside(lambda: torch.autograd.grad(loss, inputs))
    assert ran == ["reference", "reference"]
    assert_close(gradients, torch.autograd.grad(sum(t.sum() for t in mixture_logistic(*inputs)), inputs))


@every_op
def test_the_reference_is_never_captured(op, shapes, monkeypatch):
    """It reads where rows stand, which no graph can: it is refused before it has broken the capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), torch.device("cuda"):
        inputs = [torch.zeros(shape) for shape in shapes]
        with use_backend("reference"), pytest.raises(NotImplementedError, match="no CUDA graph can hold it"):
            op(*inputs)


def test_a_decoder_does_not_capture_the_reference():
    steps = []
    with use_backend("reference"):
        run = GraphRunner(torch.device("cuda"))
        for _ in range(5):
            run(lambda: steps.append("launched"))
    assert steps == ["launched"] * 5
