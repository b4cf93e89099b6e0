"""The ops as torch and their callers see them: gradients, the compiler, autocast, the choice of backend, errors."""

import contextlib
from functools import partial

import pytest
import torch
from torch import library
from torch.testing import assert_close

from helpers import BACKENDS, DEVICE, INTERPRETED, draw
from tarflow_kernels import (
    affine_forward,
    affine_inverse,
    causal_attention,
    decode_attention,
    dispatch,
    guided_affine_inverse,
    use_backend,
)

pytestmark = pytest.mark.usefixtures("on_device")


def decode(q, k, v, cache_k, cache_v, tau):
    """:func:`decode_attention` as a pure function: its output, and the caches after it."""
    caches = cache_k.clone(), cache_v.clone()
    positions = torch.tensor([0, 3], dtype=torch.int32)
    return decode_attention(q, k, v, *caches, positions, temperature=tau.exp()), *caches


def attend(q, k, v, tau):
    return causal_attention(q, k, v, temperature=tau.exp())


HEADS, CACHE, TOKENS = (2, 3, 5, 4), (2, 3, 9, 4), (2, 3, 4)

# Every public function, and the shapes of the tensors it takes.
OPS = {
    "causal_attention": (attend, [HEADS, HEADS, HEADS, (2,)]),
    "affine_forward": (affine_forward, [TOKENS] * 3),
    "affine_forward, shift": (partial(affine_forward, shift=True), [TOKENS] * 3),
    "affine_inverse": (affine_inverse, [TOKENS] * 3),
    "affine_inverse, shift": (partial(affine_inverse, shift=True), [TOKENS] * 3),
    "guided_affine_inverse": (partial(guided_affine_inverse, weight=1.7), [TOKENS] * 5),
    "guided_affine_inverse, weights": (guided_affine_inverse, [*[TOKENS] * 5, (3,)]),
    "guided_affine_inverse, weights of rows": (guided_affine_inverse, [*[TOKENS] * 5, (2, 3)]),
    "decode_attention": (decode, [HEADS, HEADS, HEADS, CACHE, CACHE, (2,)]),
}
every_op = pytest.mark.parametrize(("op", "shapes"), OPS.values(), ids=OPS)
DIFFERENTIABLE = {name: row for name, row in OPS.items() if name != "decode_attention"}


def inputs_of(shapes, requires_grad=True, dtype=torch.float64):
    draws = (draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))
    return [t.mul(0.5).requires_grad_(requires_grad) for t in draws]


def name_of(op):
    return getattr(op, "func", op).__name__


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "shapes"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients(op, shapes, backend):
    if backend == "triton" and ("guided" in name_of(op) or DEVICE != "cpu"):
        pytest.skip("no kernel differentiates guidance, and none takes float64 on a GPU")
    with use_backend(backend):
        assert torch.autograd.gradcheck(op, inputs_of(shapes), fast_mode=INTERPRETED)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@every_op
def test_compiled_whole_it_is_the_same(op, shapes, backend):
    torch.compiler.reset()
    differentiable = op is not decode and not (backend == "triton" and "guided" in name_of(op))
    results = []
    with use_backend(backend) if backend else contextlib.nullcontext():
        for run in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
            inputs = inputs_of(shapes, differentiable, torch.float64 if DEVICE == "cpu" else torch.float32)
            outputs = run(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if differentiable:
                outputs += torch.autograd.grad([t.sin().sum() for t in outputs], inputs)
            results.append(outputs)
    assert_close(*results)


@pytest.mark.parametrize(
    ("name", "shapes", "rest"),
    [
        ("causal_attention", [HEADS] * 3, (None, 0.3)),
        ("causal_attention", [HEADS] * 3, (torch.tensor([0.5, 2.0]), 0.3)),
        ("affine_forward", [TOKENS] * 3, (True,)),
        ("affine_inverse", [TOKENS] * 3, (False,)),
        ("affine_inverse", [(3,)] * 3, (False,)),
        ("guided_affine_inverse", [TOKENS] * 5, (None, 1.7)),
        ("guided_affine_inverse", [TOKENS] * 5, (torch.tensor([0.5, 1.0, 2.0]), 0.0)),
        ("decode_attention", [HEADS, HEADS, HEADS, CACHE, CACHE], (torch.tensor([0, 3]).int(), None, 0.3)),
    ],
)
def test_registration(name, shapes, rest):
    inputs = inputs_of(shapes, requires_grad=name != "decode_attention")
    rest = [t.to(inputs[0].device) if isinstance(t, torch.Tensor) else t for t in rest]
    library.opcheck(getattr(torch.ops.tarflow, name).default, (*inputs, *rest))


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


def test_autocast_reaches_attention_and_leaves_affine_maps():
    q, k, v = draw(0, 3, 2, 2, 5, 16, dtype=torch.float32)
    caches = torch.zeros(2, 2, 2, 5, 16, dtype=torch.bfloat16)
    attended, affine = causal_attention(q, k, v), affine_forward(q, k, v)
    inverse, guided = affine_inverse(q, k, v), guided_affine_inverse(q, k, v, k, v, 1.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        low = causal_attention(q, k, v), decode_attention(q, k, v, *caches, torch.zeros(2, dtype=torch.int32))
        low += (causal_attention(q, k, v, temperature=torch.ones(2)),)
        assert_close((affine_forward(q, k, v), affine_inverse(q, k, v)), (affine, inverse), atol=0, rtol=0)
        assert_close(guided_affine_inverse(q, k, v, k, v, 1.0), guided, atol=0, rtol=0)
    assert {t.dtype for t in low} == {torch.bfloat16}
    assert_close([t.float() for t in low], [attended] * 3, atol=0.03, rtol=0.03)


@every_op
def test_an_op_without_a_triton_kernel_says_so(op, shapes, monkeypatch):
    for implementations in dispatch._implementations.values():
        monkeypatch.delitem(implementations, "triton", raising=False)
    with use_backend("triton"), pytest.raises(NotImplementedError, match=r"^\w+ has no triton implementation; it has"):
        op(*inputs_of(shapes, requires_grad=False))


def test_a_backend_holds_until_its_block_ends_even_by_an_error(monkeypatch):
    ran = []
    for name in ("torch", "reference"):
        monkeypatch.setitem(dispatch._implementations["affine_forward"], name, lambda *_, name=name: ran.append(name))

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


X, INTEGERS, WIDE = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)
Q, HALF, LONG = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4).half(), torch.zeros(2, 1, 4, 4)
ELSEWHERE = torch.device("meta")
CACHED, AT = torch.zeros(2, 1, 5, 4), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: affine_forward(INTEGERS, X, X), TypeError, "x"),
        (lambda: affine_forward(X, WIDE, X), ValueError, "mu"),
        (lambda: affine_forward(X, X, INTEGERS), TypeError, "alpha"),
        (lambda: affine_forward(X, X, X[:1]), ValueError, "alpha"),
        (lambda: affine_forward(X[0, 0], X[0, 0], X[0, 0]), ValueError, "x"),
        (lambda: affine_forward(X[0], X[0], X[0], shift=True), ValueError, "x"),
        (lambda: affine_inverse(INTEGERS, X, X), TypeError, "z"),
        (lambda: affine_inverse(X[0], X[0], X[0], shift=True), ValueError, "z"),
        (lambda: affine_inverse(X, X, WIDE), ValueError, "alpha"),
        (lambda: guided_affine_inverse(INTEGERS, X, X, X, X, 1.0), TypeError, "z"),
        (lambda: guided_affine_inverse(X, X, X, WIDE, X, 1.0), ValueError, "mu_ref"),
        (lambda: guided_affine_inverse(X, X, X, X, INTEGERS, 1.0), TypeError, "alpha_ref"),
        (lambda: guided_affine_inverse(X, X, X, X, X, WIDE), ValueError, "weight"),
        (lambda: guided_affine_inverse(X, X, X, X, X, X[0, 0]), ValueError, "weight"),
        (lambda: guided_affine_inverse(*[X[0]] * 5, X[0]), ValueError, "weight"),
        (lambda: causal_attention(Q.int(), Q, Q), TypeError, "q"),
        (lambda: causal_attention(X, X, X), ValueError, "q"),
        (lambda: causal_attention(Q, HALF, Q), TypeError, "k"),
        (lambda: causal_attention(Q, Q, LONG), ValueError, "v"),
        (lambda: causal_attention(Q, Q, Q, temperature=0.0), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, temperature=float("nan")), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, temperature=float("inf")), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, temperature=torch.ones(2, device=ELSEWHERE)), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, scale=-1.0), ValueError, "scale"),
        (lambda: causal_attention(Q, Q, Q.to(ELSEWHERE)), ValueError, "v"),
        (lambda: affine_forward(X, X.to(ELSEWHERE), X), ValueError, "mu"),
        (lambda: causal_attention(Q, Q, Q, temperature=torch.ones(3)), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, temperature=torch.ones(2).int()), TypeError, "temperature"),
        (lambda: decode_attention(Q.int(), Q, Q, CACHED, CACHED, AT), TypeError, "q"),
        (lambda: decode_attention(X, X, X, CACHED, CACHED, AT), ValueError, "q"),
        (lambda: decode_attention(Q, LONG, Q, CACHED, CACHED, AT), ValueError, "k"),
        (lambda: decode_attention(Q, Q, HALF, CACHED, CACHED, AT), TypeError, "v"),
        (lambda: decode_attention(Q, Q, Q, CACHED.half(), CACHED, AT), TypeError, "cache_k"),
        (lambda: decode_attention(Q, Q, Q, CACHED[:1], CACHED, AT), ValueError, "cache_k"),
        (lambda: decode_attention(Q, Q, Q, CACHED.flatten(), CACHED, AT), ValueError, "cache_k"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED[0], AT), ValueError, "cache_v"),
        (lambda: decode_attention(Q, Q, Q, CACHED, LONG, AT), ValueError, "cache_v"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT.long()), TypeError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT[:1]), ValueError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT.to(ELSEWHERE)), ValueError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED.to(ELSEWHERE), AT), ValueError, "cache_v"),
        (lambda: decode_attention(Q, Q, Q, CACHED[:, :, :2], CACHED[:, :, :2], AT), ValueError, "q"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT, scale=0.0), ValueError, "scale"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT + 3), ValueError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT - 1), ValueError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT, temperature=-1.0), ValueError, "temperature"),
        (lambda: use_backend("cuda").__enter__(), ValueError, "name"),
    ],
)
def test_an_error_names_the_argument(call, error, argument):
    with pytest.raises(error, match=rf"^{argument}: expected .*; got "):
        call()
