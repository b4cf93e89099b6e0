"""The ops as torch and their callers see them: gradients, the compiler, autocast, the choice of backend, errors."""

import contextlib
import math
import threading
from functools import partial

import pytest
import torch
from tarflow.decoding.graphs import Replayed
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from helpers import BACKENDS, DEVICE, INTERPRETED, draw
from tarflow_kernels import (
    affine_forward,
    affine_inverse,
    causal_attention,
    decode_attention,
    dispatch,
    embed_next,
    mixture_logistic,
    mixture_logistic_inverse,
    residual_norm,
    use_backend,
)
from tarflow_kernels.implicit import with_gradients

pytestmark = pytest.mark.usefixtures("on_device")


def decode(q, k, v, cache_k, cache_v, tau):
    """:func:`decode_attention` as a pure function: its output, and the caches after it."""
    caches = cache_k.clone(), cache_v.clone()
    positions = torch.tensor([0, 3][: len(q)], dtype=torch.int32)
    return decode_attention(q, k, v, *caches, positions, temperature=tau.exp()), *caches


def attend(q, k, v, tau):
    return causal_attention(q, k, v, temperature=tau.exp())


def normalize(h, delta, weight, bias):
    """:func:`residual_norm` as a pure function: with something to add and without, and h after it."""
    h = h.clone()
    return residual_norm(h, delta, weight, bias), residual_norm(h, None, weight, bias, dtype=torch.float32), h


def embed(x, z, mu, alpha, projection, embedding, context=None, mu_ref=None, alpha_ref=None, weights=None):
    """:func:`embed_next` as a pure function: its output, and x after it."""
    x, at = x.clone(), torch.tensor([0, 1][: len(x)], dtype=torch.int32)
    return embed_next(x, z, mu, alpha, mu_ref, alpha_ref, weights, at, projection, embedding, context), x


HEADS, CACHE, TOKENS = (2, 3, 5, 4), (2, 3, 9, 4), (2, 3, 4)
MIXTURE = [(2, 3), *[(2, 3, 5)] * 3]
EMBED = [(2, 3, 6), (2, 3, 6), (2, 6), (2, 6), (6, 5), (3, 5)]

# Every public function, and the shapes of the tensors it takes; those that change their arguments have no gradients.
DIFFERENTIABLE = {
    "causal_attention": (attend, [HEADS, HEADS, HEADS, (2,)]),
    "affine_forward": (affine_forward, [TOKENS] * 3),
    "affine_forward, shift": (partial(affine_forward, shift=True), [TOKENS] * 3),
    "affine_inverse": (affine_inverse, [TOKENS] * 3),
    "affine_inverse, shift": (partial(affine_inverse, shift=True), [TOKENS] * 3),
    "mixture_logistic": (mixture_logistic, MIXTURE),
    "mixture_logistic, no floor": (partial(mixture_logistic, min_log_scale=-math.inf), MIXTURE),
    "mixture_logistic_inverse": (partial(mixture_logistic_inverse, min_log_scale=-0.1), MIXTURE),
}
IN_PLACE = {
    "decode_attention": (decode, [HEADS, HEADS, HEADS, CACHE, CACHE, (2,)]),
    "residual_norm": (normalize, [TOKENS, TOKENS, (4,), (4,)]),
    "embed_next": (embed, EMBED),
    "embed_next, guided": (embed, [*EMBED, (4, 5), (2, 6), (2, 6), (3,)]),
}
OPS = DIFFERENTIABLE | IN_PLACE
STANDING, EYE = torch.tensor([0, 1], dtype=torch.int32), torch.eye(4, dtype=torch.float64)
every_op = pytest.mark.parametrize(("op", "shapes"), OPS.values(), ids=OPS)


def inputs_of(shapes, requires_grad=True, dtype=torch.float64):
    draws = (draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))
    return [t.mul(0.5).requires_grad_(requires_grad) for t in draws]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "shapes"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients(op, shapes, backend):
    if backend == "triton" and DEVICE != "cpu":
        pytest.skip("no kernel takes float64 on a GPU")
    with use_backend(backend):
        assert torch.autograd.gradcheck(op, inputs_of(shapes), fast_mode=INTERPRETED)


def second_derivatives(op, inputs):
    """Those of a sum, whose gradients owe all that they are to the inputs: the gradients that come in are constants."""
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    first = torch.autograd.grad([t.sum() for t in outputs], inputs, create_graph=True, materialize_grads=True)
    loss = sum((gradient * t).sin().sum() for gradient, t in zip(first, inputs, strict=True))
    return first, torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "shapes"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_second_derivatives_are_right_or_an_error(op, shapes, backend):
    if backend == "triton" and DEVICE != "cpu":
        pytest.skip("no kernel takes float64 on a GPU")
    with use_backend("reference"):
        expected = second_derivatives(op, inputs_of(shapes))
    with use_backend(backend):
        if backend == "torch" and op is attend and DEVICE == "cpu":
            with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
                second_derivatives(op, inputs_of(shapes))
        else:
            assert_close(second_derivatives(op, inputs_of(shapes)), expected)
            assert torch.autograd.gradgradcheck(op, inputs_of(shapes), fast_mode=True)


def test_an_inverse_that_is_differentiable_once_says_so():
    x, w = draw(0, 2, 3).requires_grad_(), draw(1, 3, 3).tril(-1).requires_grad_()
    y = (x + torch.tanh(x) @ w.mT).detach().requires_grad_()
    found = with_gradients(x.detach(), y, lambda x: torch.tanh(x) @ w.mT, torch.add)
    gradients = torch.autograd.grad(found.sum(), (y, w), create_graph=True)
    for t in (y, w):
        with pytest.raises(NotImplementedError, match="once, not twice"):
            torch.autograd.grad([gradient.sum() for gradient in gradients] + [w.sum() + y.sum()], t, retain_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@every_op
def test_a_batch_of_nothing_has_empty_results_and_gradients(op, shapes, backend):
    """Whatever has as many rows as the batch, 2, or both its branches, 4, has none."""
    differentiable = op not in (decode, normalize, embed)
    empty = [(0, *shape[1:]) if shape[0] == 2 or shape == (4, 5) else shape for shape in shapes]
    inputs = inputs_of(empty, differentiable, torch.float64 if DEVICE == "cpu" else torch.float32)
    full = inputs_of(shapes, False, inputs[0].dtype)
    with use_backend(backend):
        outputs, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (op(*inputs), op(*full)))
        assert [t.shape for t in outputs] == [(0, *t.shape[1:]) for t in expected]
        if differentiable:
            gradients = torch.autograd.grad([t.sum() for t in outputs], inputs, materialize_grads=True)
            assert [t.shape for t in gradients] == empty


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@every_op
def test_compiled_whole_it_is_the_same(op, shapes, backend):
    torch.compiler.reset()
    differentiable = op not in (decode, normalize, embed)
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
        ("mixture_logistic", MIXTURE, (-7.0,)),
        ("mixture_logistic", [(3,), *[(3, 1)] * 3], (-7.0,)),
        ("mixture_logistic_inverse", MIXTURE, (-math.inf,)),
        ("decode_attention", [HEADS, HEADS, HEADS, CACHE, CACHE], (torch.tensor([0, 3]).int(), None, 0.3)),
        ("residual_norm", [TOKENS, TOKENS, (4,), (4,)], (1e-5, torch.float32)),
        ("embed_next", [TOKENS, TOKENS, *[(2, 4)] * 4, (3,)], (STANDING, EYE, EYE[:3], None)),
    ],
)
def test_registration(name, shapes, rest):
    inputs = inputs_of(shapes, requires_grad=name not in IN_PLACE)
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


def test_autocast_reaches_attention_and_leaves_maps():
    q, k, v = draw(0, 3, 2, 2, 5, 16, dtype=torch.float32)
    caches = torch.zeros(2, 2, 2, 5, 16, dtype=torch.bfloat16)
    attended, affine, inverse = causal_attention(q, k, v), affine_forward(q, k, v), affine_inverse(q, k, v)
    mixtures = [op(q[..., 0], k, v, q) for op in (mixture_logistic, mixture_logistic_inverse)]
    with torch.autocast(DEVICE, torch.bfloat16):
        low = causal_attention(q, k, v), decode_attention(q, k, v, *caches, torch.zeros(2, dtype=torch.int32))
        low += (causal_attention(q, k, v, temperature=torch.ones(2)),)
        assert_close((affine_forward(q, k, v), affine_inverse(q, k, v)), (affine, inverse), atol=0, rtol=0)
        for op, expected in zip((mixture_logistic, mixture_logistic_inverse), mixtures, strict=True):
            assert_close(op(q[..., 0], k, v, q), expected, atol=0, rtol=0)
    assert {t.dtype for t in low} == {torch.bfloat16}
    assert_close([t.float() for t in low], [attended] * 3, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("name", ["residual_norm", "embed_next", "embed_next, guided"])
def test_autocast_leaves_the_small_ops_of_a_step(name):
    op, shapes = IN_PLACE[name]
    inputs = inputs_of(shapes, requires_grad=False, dtype=torch.float32)
    expected = op(*inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_close(op(*inputs), expected, atol=0, rtol=0)


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
    """What a function returns when another thread calls it."""
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
    """Also where the forward pass is run again there."""
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
        replayed = Replayed(torch.device("cuda"))
        for _ in range(5):
            replayed(lambda: steps.append("launched"))
    assert steps == ["launched"] * 5


X, INTEGERS, WIDE = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)
Q, HALF, LONG = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4).half(), torch.zeros(2, 1, 4, 4)
ELSEWHERE = torch.device("meta")
CACHED, AT = torch.zeros(2, 1, 5, 4), torch.zeros(2, dtype=torch.int32)
SEQUENCE, ONE = torch.zeros(2, 5, 3), torch.zeros(2, 3, 1)


def embed_with(**wrong):
    """:func:`embed_next` under guidance, with all arguments right but these."""
    right = {"x": SEQUENCE, "z": SEQUENCE, "mu": X, "alpha": X, "mu_ref": X, "alpha_ref": X, "weights": torch.zeros(5)}
    right |= {"positions": AT, "projection": torch.zeros(3, 4), "embedding": torch.zeros(5, 4)}
    return embed_next(**right | {"context": torch.zeros(4, 4)} | wrong)


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
        (lambda: mixture_logistic(INTEGERS, ONE, ONE, ONE), TypeError, "x"),
        (lambda: mixture_logistic(X[0, 0], *[X[0]] * 3), ValueError, "x"),
        (lambda: mixture_logistic(X, X, X, X), ValueError, "logits"),
        (lambda: mixture_logistic(X, ONE[:1], ONE[:1], ONE[:1]), ValueError, "logits"),
        (lambda: mixture_logistic(X, *[ONE[..., :0]] * 3), ValueError, "logits"),
        (lambda: mixture_logistic(X, *[ONE.expand(2, 3, 65)] * 3), ValueError, "logits"),
        (lambda: mixture_logistic(X, ONE, ONE.expand(2, 3, 2), ONE), ValueError, "means"),
        (lambda: mixture_logistic(X, ONE, ONE.int(), ONE), TypeError, "means"),
        (lambda: mixture_logistic(X, ONE, ONE, X), ValueError, "log_scales"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE.to(ELSEWHERE)), ValueError, "log_scales"),
        (lambda: mixture_logistic(X.to(ELSEWHERE), ONE, ONE, ONE), ValueError, "logits"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE, min_log_scale=float("nan")), ValueError, "min_log_scale"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE, min_log_scale=float("inf")), ValueError, "min_log_scale"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE, min_log_scale=None), TypeError, "min_log_scale"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE, min_log_scale=ONE), TypeError, "min_log_scale"),
        (lambda: mixture_logistic_inverse(INTEGERS, ONE, ONE, ONE), TypeError, "v"),
        (lambda: mixture_logistic_inverse(X, ONE, ONE[..., 0], ONE), ValueError, "means"),
        (lambda: causal_attention(Q.int(), Q, Q), TypeError, "q"),
        (lambda: causal_attention(X, X, X), ValueError, "q"),
        (lambda: causal_attention(*[Q[..., :0]] * 3), ValueError, "q"),
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
        (lambda: decode_attention(*[Q[..., :0]] * 3, *[CACHED[..., :0]] * 2, AT), ValueError, "q"),
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
        (lambda: residual_norm(INTEGERS, X, X[0], X[0]), TypeError, "h"),
        (lambda: residual_norm(X[0, 0], None, X[0, 0], X[0, 0]), ValueError, "h"),
        (lambda: residual_norm(X, WIDE, X[0], X[0]), ValueError, "delta"),
        (lambda: residual_norm(X, INTEGERS, X[0], X[0]), TypeError, "delta"),
        (lambda: residual_norm(X, X.to(ELSEWHERE), X[0], X[0]), ValueError, "delta"),
        (lambda: residual_norm(X, X, X, X[0]), ValueError, "weight"),
        (lambda: residual_norm(X, X, X[0].half(), X[0]), TypeError, "weight"),
        (lambda: residual_norm(X, X, X[0], WIDE[0]), ValueError, "bias"),
        (lambda: residual_norm(X, X, X[0], X[0].to(ELSEWHERE)), ValueError, "bias"),
        (lambda: residual_norm(X, X, X[0], X[0], eps=0.0), ValueError, "eps"),
        (lambda: residual_norm(X, X, X[0], X[0], eps=float("nan")), ValueError, "eps"),
        (lambda: residual_norm(X, X, X[0], X[0], dtype=torch.int64), TypeError, "dtype"),
        (lambda: residual_norm(X, X, X[0], X[0], dtype="float32"), TypeError, "dtype"),
        (lambda: embed_with(x=SEQUENCE.half()), TypeError, "x"),
        (lambda: embed_with(x=X), ValueError, "x"),
        (lambda: embed_with(z=SEQUENCE[:1]), ValueError, "z"),
        (lambda: embed_with(z=SEQUENCE.double()), TypeError, "z"),
        (lambda: embed_with(mu=WIDE), ValueError, "mu"),
        (lambda: embed_with(mu=X.to(ELSEWHERE)), ValueError, "mu"),
        (lambda: embed_with(alpha=INTEGERS), TypeError, "alpha"),
        (lambda: embed_with(mu_ref=None), ValueError, "mu_ref"),
        (lambda: embed_with(alpha_ref=WIDE), ValueError, "alpha_ref"),
        (lambda: embed_with(mu_ref=INTEGERS), TypeError, "mu_ref"),
        (lambda: embed_with(weights=X[0]), ValueError, "weights"),
        (lambda: embed_with(weights=None), ValueError, "weights"),
        (lambda: embed_with(weights=torch.zeros(5).int()), TypeError, "weights"),
        (lambda: embed_with(positions=AT.long()), TypeError, "positions"),
        (lambda: embed_with(positions=AT[:1]), ValueError, "positions"),
        (lambda: embed_with(positions=AT.to(ELSEWHERE)), ValueError, "positions"),
        (lambda: embed_with(projection=WIDE), ValueError, "projection"),
        (lambda: embed_with(projection=WIDE[0]), ValueError, "projection"),
        (lambda: embed_with(projection=torch.zeros(3, 4).double()), TypeError, "projection"),
        (lambda: embed_with(embedding=WIDE), ValueError, "embedding"),
        (lambda: embed_with(embedding=torch.zeros(5, 4).half()), TypeError, "embedding"),
        (lambda: embed_with(context=WIDE), ValueError, "context"),
        (lambda: embed_with(context=torch.zeros(4, 4).double()), TypeError, "context"),
        (lambda: embed_with(context=torch.zeros(4, 4, device=ELSEWHERE)), ValueError, "context"),
        (lambda: use_backend("cuda").__enter__(), ValueError, "name"),
    ],
)
def test_an_error_names_the_argument(call, error, argument):
    # All on one device, whatever the default: what does not fit is what the call says, and nothing else.
    with torch.device("cpu"), pytest.raises(error, match=rf"^{argument}: expected .*; got "):
        call()
