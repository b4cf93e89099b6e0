"""Every op computes its formula and its gradients, over any shape and strides, in either precision, compiled or not."""

import contextlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.testing import assert_close

from helpers import BACKENDS, BFLOAT16, DEVICE, INTERPRETED, draw
from op_cases import (
    ATTENTION,
    CACHES,
    DIFFERENTIABLE,
    IN_PLACE,
    MIXTURE,
    TOKENS,
    attend,
    decode,
    embed,
    every_op,
    inputs_of,
    normalize,
)
from tarflow_kernels import (
    KVCache,
    affine_forward,
    affine_inverse,
    causal_attention,
    decode_attention,
    embed_next,
    mixture_logistic,
    mixture_logistic_inverse,
    reference,
    residual_norm,
    use_backend,
)
from tarflow_kernels.implicit import with_gradients

pytestmark = pytest.mark.usefixtures("on_device")

# No kernel takes float64 on a GPU, where the backends would differ only in what is tested elsewhere.
PRECISIONS = st.sampled_from([(torch.float64, 1e-11)] * (DEVICE == "cpu") + [(torch.float32, 2e-4)])
DTYPE, TOLERANCE = (torch.float64, 1e-11) if DEVICE == "cpu" else (torch.float32, 2e-4)
BATCHES = st.sampled_from([0, 1, 2, 3])
HEADS = st.integers(1, 3)
LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 113, 257])
HEAD_DIMS = st.sampled_from([16, 24, 32, 64, 96, 128])
SHAPES = st.sampled_from(
    [(2, 5), (3, 4), (1, 1), (2, 16, 3), (3, 1, 2), (2, 0, 3), (2, 3, 2, 4), (113, 65), (2, 40, 70), (2, 3, 1, 2, 3)]
)
SEEDS = st.integers(0, 1000)


def nans(t):
    return torch.full_like(t, math.nan)


def fused(t):
    """Lay out as one part of the projection (B, N, 3, H, D) to queries, keys and values."""
    qkv = torch.stack((nans(t), t, nans(t))).permute(1, 3, 0, 2, 4).contiguous()
    return qkv.permute(2, 0, 3, 1, 4)[1]


# Where a tensor lies in memory; what lies beside it is poison.
ATTENTION_LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "fused": fused,
    "one head for all": lambda t: t[:, :1].expand(t.shape),
    "batch within tokens": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
}
AFFINE_LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "half of an output": lambda t: torch.cat((nans(t), t), -1).chunk(2, -1)[1],
    "every other value": lambda t: torch.stack((t, nans(t)), -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "broadcast": lambda t: t[..., :1].expand(t.shape),
}
MIXTURE_LAYOUTS = AFFINE_LAYOUTS | {
    "of channels": lambda t: torch.cat((nans(t), t), -1).movedim(-1, 1).contiguous().movedim(1, -1).chunk(2, -1)[1],
}
COTANGENTS = {
    "plain": lambda t: draw(1, *t.shape),
    "of a sum": lambda t: torch.ones(()).expand(t.shape),
    "transposed": lambda t: draw(2, *t.shape[::-1]).permute(*reversed(range(t.dim()))),
}
# How the logits are scaled; tau is a tensor of one temperature for each row.
SCALINGS = {
    "default": lambda tau: {},
    "scale": lambda tau: {"scale": 0.3},
    "number": lambda tau: {"temperature": 1.7},
    "rows": lambda tau: {"temperature": tau},
    "scale and rows": lambda tau: {"scale": 0.3, "temperature": tau},
}


def one_of(table):
    return st.sampled_from(sorted(table)).map(table.get)


def run(op, inputs, cotangent):
    """Run an op, and return its outputs and the gradients of all its inputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [cotangent(t).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)]


def agree(call, op, inputs, cotangent, tolerance, backends=BACKENDS):
    """Check that the op, in the precision of its inputs and on every backend, does what its formula does in float64."""
    formula = getattr(reference, op.__name__)
    expected = run(partial(call, formula), [t.double() for t in inputs], cotangent)
    for backend in backends:
        with use_backend(backend):
            results = run(partial(call, op), inputs, cotangent)
        for result, value in zip(results, expected, strict=True):
            assert result.dtype == inputs[0].dtype
            # A temperature is in all outputs of its row: its gradient adds up their rounding.
            summed = max(1.0, expected[0].numel() / max(1, value.numel())) ** 0.5
            assert_close(result.double(), value, atol=tolerance * summed, rtol=tolerance)


@given(
    shape=st.tuples(BATCHES, HEADS, LENGTHS, HEAD_DIMS),
    precision=PRECISIONS,
    layout=one_of(ATTENTION_LAYOUTS),
    scaling=one_of(SCALINGS),
    cotangent=one_of(COTANGENTS),
    seed=SEEDS,
)
def test_causal_attention(shape, precision, layout, scaling, cotangent, seed):
    dtype, tolerance = precision
    qkv = [layout(t) for t in draw(seed, 3, *shape, dtype=dtype)]
    tau = draw(seed, shape[0], dtype=dtype).exp()

    def call(op, q, k, v, tau):
        return op(q, k, v, **scaling(tau))

    agree(call, causal_attention, [*qkv, tau], cotangent, tolerance)


@given(
    op=st.sampled_from([affine_forward, affine_inverse]),
    shape=SHAPES | st.just((3,)),
    precision=PRECISIONS,
    layouts=st.tuples(*[one_of(AFFINE_LAYOUTS)] * 3),
    shift=st.booleans(),
    cotangent=one_of(COTANGENTS),
    seed=SEEDS,
)
def test_affine(op, shape, precision, layouts, shift, cotangent, seed):
    dtype, tolerance = precision
    inputs = [layout(t) for layout, t in zip(layouts, draw(seed, 3, *shape, dtype=dtype), strict=True)]

    def call(op, *inputs):
        return op(*inputs, shift=shift and len(shape) > 1)

    agree(call, op, inputs, cotangent, tolerance)


@settings(max_examples=settings.default.max_examples // (2 if INTERPRETED else 1))
@given(
    op=st.sampled_from([mixture_logistic, mixture_logistic_inverse]),
    shape=st.sampled_from([(3,), (2, 5), (1, 1), (2, 0, 3), (3, 1, 2), (2, 3, 2, 4), (2, 40, 7), (65, 3)]),
    components=st.sampled_from([1, 2, 3, 4, 10, 32, 64]),
    precision=PRECISIONS,
    layouts=st.tuples(one_of(AFFINE_LAYOUTS), *[one_of(MIXTURE_LAYOUTS)] * 3),
    floor=st.sampled_from([-7.0, -0.4, -math.inf]),
    cotangent=one_of(COTANGENTS),
    seed=SEEDS,
)
def test_mixture_logistic(op, shape, components, precision, layouts, floor, cotangent, seed):
    dtype, tolerance = precision
    draws = draw(seed, *shape, dtype=dtype), *draw(seed + 1, 3, *shape, components, dtype=dtype)
    inputs = [layout(t) for layout, t in zip(layouts, draws, strict=True)]

    def call(op, *inputs):
        return op(*inputs, min_log_scale=floor)

    agree(call, op, inputs, cotangent, tolerance)


@given(shape=SHAPES, seed=SEEDS)
def test_affine_maps_undo_each_other(shape, seed):
    x, mu, alpha = draw(seed, 3, *shape)
    z, logdet = affine_forward(x, mu, alpha)
    assert_close(affine_inverse(z, mu, alpha), (x, -logdet))


def test_shifted_parameters_are_those_of_the_token_before():
    x, mu, alpha = draw(0, 3, 2, 5, 3)
    tail, logdet = affine_forward(x[:, 1:], mu[:, :-1], alpha[:, :-1])
    assert_close(affine_forward(x, mu, alpha, shift=True), (torch.cat((x[:, :1], tail), 1), logdet))


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="it is the torch implementation that torch.func takes apart")
@pytest.mark.parametrize("op", [affine_forward, affine_inverse])
def test_affine_maps_are_mapped_over_batches_of_batches(op):
    """By torch.func, which asks for stock operators."""
    inputs = draw(0, 3, 2, 4, 5, 6)
    mapped = torch.func.vmap(partial(op, shift=True))(*inputs.unbind())
    for i, one in enumerate(inputs.unbind(1)):  # one of two batches
        assert_close([result[i] for result in mapped], list(op(*one, shift=True)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "sign"), [(affine_forward, -1), (affine_inverse, 1)])
def test_parameters_of_low_precision_leave_results_in_full(op, sign, backend):
    x, alpha = torch.ones(2, 999), draw(0, 2, 999, dtype=torch.bfloat16)
    mu = torch.zeros_like(alpha)
    for dtype in (torch.float32, torch.float64):
        exact = sign * alpha.to(dtype)
        with use_backend(backend):
            assert_close(op(x.to(dtype), mu, alpha), (exact.exp(), exact.sum(1)))
            assert op(x.bfloat16(), mu, alpha)[0].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [affine_forward, affine_inverse, mixture_logistic, mixture_logistic_inverse])
def test_results_may_be_written_to(op, backend):
    inputs = torch.ones(2), *(torch.ones(2) if "affine" in op.__name__ else torch.ones(2, 1) for _ in range(3))
    inputs = inputs[: 3 if "affine" in op.__name__ else 4]
    with use_backend(backend):
        for result in op(*inputs):
            result.zero_()
    assert all(t.all() for t in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [BFLOAT16, torch.float32], ids=str)
def test_temperatures_may_be_more_precise_than_queries(low, backend):
    q, k, v = draw(0, 3, 2, 2, 5, 16, dtype=low)
    tau, start = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.int32)
    expected = reference.causal_attention(q.double(), k.double(), v.double(), temperature=tau).to(low)
    with use_backend(backend):
        attended = causal_attention(q, k, v, temperature=tau)
        decoded = decode_attention(q, k, v, torch.zeros_like(k), torch.zeros_like(v), start, temperature=tau)
    assert_close((attended, decoded), (expected, expected), atol=0.05, rtol=0.05)


@settings(max_examples=settings.default.max_examples * 3 // 2)
@given(
    backend=st.sampled_from(BACKENDS),
    shape=st.tuples(BATCHES, HEADS, LENGTHS, HEAD_DIMS),
    precision=PRECISIONS,
    layout=one_of(ATTENTION_LAYOUTS),
    scaling=one_of(SCALINGS),
    new=st.integers(1, 5),
    abreast=st.booleans(),
    poison=st.sampled_from([math.nan, math.inf, torch.finfo(torch.float32).max]),
    seed=SEEDS,
)
def test_decode_attention_goes_on_from_where_each_row_stands(
    backend, shape, precision, layout, scaling, new, abreast, poison, seed
):
    """It gives the rows of causal attention, reads nothing that was not written, and writes nothing else."""
    (dtype, tolerance), (batch, _, length, _) = precision, shape
    q, k, v = (layout(t) for t in draw(seed, 3, *shape, dtype=dtype))
    options = scaling(draw(seed, batch, dtype=dtype).exp())
    new = min(new, length)
    draws = draw(seed, batch).abs() * length
    positions = (draws[:1].expand(batch) if abreast else draws).int() % (length - new + 1)
    index = positions[:, None] + torch.arange(new)

    def window(t):
        return t[torch.arange(batch)[:, None], :, index].transpose(1, 2)

    def cached(t, end):
        """Room for two tokens more, and poison where none was written."""
        unwritten = torch.arange(length + 2)[:, None] >= end.view(-1, 1, 1, 1)
        return F.pad(t, (0, 0, 0, 2)).masked_fill(unwritten, poison)

    cache_k, cache_v = cached(k, positions), cached(v, positions)
    expected = window(reference.causal_attention(q.double(), k.double(), v.double(), **options)).to(dtype)
    with use_backend(backend):
        result = decode_attention(*(layout(window(t)) for t in (q, k, v)), cache_k, cache_v, positions, **options)
    assert_close(result, expected, atol=tolerance, rtol=tolerance)
    for cache, written in ((cache_k, k), (cache_v, v)):
        assert_close(cache, cached(written, positions + new), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("steps", [[1] * 9, [9], [2, 3, 1, 3]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_in_steps_is_causal_attention(backend, steps):
    layers = draw(0, 2, 3, 3, 2, 9, 16, dtype=DTYPE)  # queries, keys and values of two layers
    cache = KVCache.allocate(2, 3, 2, 9, 16, dtype=DTYPE)
    with use_backend(backend):
        for (q, k, v), (cache_k, cache_v) in zip(layers, cache, strict=True):
            outputs, position = [], torch.zeros(3, dtype=torch.int32)
            for parts in zip(*(t.split(steps, 2) for t in (q, k, v)), strict=True):
                outputs.append(decode_attention(*parts, cache_k, cache_v, position))
                position += parts[0].shape[2]
            assert_close(torch.cat(outputs, 2), causal_attention(q, k, v), atol=TOLERANCE, rtol=TOLERANCE)
    assert_close((cache.keys, cache.values), (layers[:, 1], layers[:, 2]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_may_go_back_and_overwrite(backend):
    q, k, v = draw(0, 3, 2, 2, 6, 16, dtype=DTYPE)
    caches = torch.full((2, 2, 2, 6, 16), math.nan, dtype=DTYPE)
    guesses = draw(1, 3, 2, 2, 6, 16, dtype=DTYPE)
    with use_backend(backend):
        decode_attention(*guesses, *caches, torch.zeros(2, dtype=torch.int32))
        for i in range(6):  # the second row is two tokens behind
            behind = max(i - 2, 0)
            parts = (torch.stack((t[0, :, i : i + 1], t[1, :, behind : behind + 1])) for t in (q, k, v))
            result = decode_attention(*parts, *caches, torch.tensor([i, behind], dtype=torch.int32))
            expected = causal_attention(q, k, v)
            expected = torch.stack((expected[0, :, i : i + 1], expected[1, :, behind : behind + 1]))
            assert_close(result, expected, atol=TOLERANCE, rtol=TOLERANCE)


def room_for(t, dim):
    """Memory with a place for t between two others of its size, all of it poison, and that place."""
    room = torch.stack([nans(t)] * 3, dim)
    return room, room.select(dim, 1)


@given(
    backend=st.sampled_from(BACKENDS),
    shape=st.sampled_from([(24,), (1, 24), (3, 64), (0, 64), (5, 96), (7, 768), (2, 3, 100), (2, 0, 3), (2, 3, 2, 1)]),
    precision=PRECISIONS,
    place=st.sampled_from([0, -2, -1]),
    layouts=st.tuples(*[one_of(AFFINE_LAYOUTS)] * 3),
    added=st.sampled_from([None, torch.float16, torch.float32]),
    result=st.sampled_from([None, torch.float32, torch.float64]),
    eps=st.sampled_from([1e-5, 0.3]),
    seed=SEEDS,
)
def test_residual_norm_updates_its_rows_and_nothing_beside_them(
    backend, shape, precision, place, layouts, added, result, eps, seed
):
    dtype, tolerance = precision
    room, h = room_for(draw(seed, *shape, dtype=dtype), place if len(shape) > 1 else 0)
    h.copy_(draw(seed, *shape))
    delta, weight, bias = (
        layout(draw(seed + k, *size, dtype=dtype))
        for k, (layout, size) in enumerate(zip(layouts, (shape, shape[-1:], shape[-1:]), strict=True), 1)
    )
    delta = None if added is None else delta.to(added)
    expected_room = room.to(torch.float64, copy=True)
    expected = reference.residual_norm(
        expected_room.select(place if len(shape) > 1 else 0, 1),
        None if delta is None else delta.double(),
        weight.double(),
        bias.double(),
        eps=eps,
    )
    with use_backend(backend):
        y = residual_norm(h, delta, weight, bias, eps=eps, dtype=result)
    assert y.dtype == (result or dtype)
    tolerance = max(tolerance, 2e-4 if y.dtype == torch.float32 else 0)
    assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    assert_close(room, expected_room.to(dtype), equal_nan=True)


@given(
    backend=st.sampled_from(BACKENDS),
    shape=st.tuples(BATCHES, st.sampled_from([2, 5]), st.sampled_from([1, 4, 12, 48, 100, 256])),
    channels=st.sampled_from([1, 24, 64, 96, 768]),
    precision=PRECISIONS,
    place=st.sampled_from([0, 1, -1]),
    layouts=st.tuples(*[one_of(AFFINE_LAYOUTS)] * 5),
    low=st.sampled_from([None, torch.float16]),
    guided=st.booleans(),
    with_context=st.booleans(),
    seed=SEEDS,
)
def test_embed_next_writes_one_token_of_each_sample(
    backend, shape, channels, precision, place, layouts, low, guided, with_context, seed
):
    (dtype, tolerance), (batch, length, token_dim) = precision, shape
    rows = (1 + guided) * batch
    at = torch.arange(seed, seed + batch, dtype=torch.int32) * 3 % (length - 1)
    room, x = room_for(draw(seed, *shape, dtype=dtype), place)
    h_room, _ = room_for(torch.zeros(rows, channels, dtype=dtype), place)
    sizes = [shape, (4, batch, token_dim), (token_dim, channels), (length, channels), (rows, channels)]
    z, parameters, projection, embedding, context = (draw(seed + k, *size, dtype=dtype) for k, size in enumerate(sizes))
    on_parameters, *others = layouts
    mu, alpha, *refs = (on_parameters(t) for t in 0.5 * parameters.to(low or dtype))
    z, projection, embedding, context = (
        layout(t) for layout, t in zip(others, (z, projection / token_dim**0.5, embedding, context), strict=True)
    )
    guidance = (*refs, draw(seed, length, dtype=dtype)) if guided else (None, None, None)
    tables = projection, embedding, context if with_context else None

    def run(op, room, h_room, convert=lambda t: t):
        """Return what has changed: the memory around x and h, and positions and tickets with a neighbour each."""
        positions, tickets = at.repeat(1 + guided).repeat_interleave(2), torch.arange(2 * batch, dtype=torch.int32) % 2
        given, converted = map(convert, (z, mu, alpha, *guidance)), map(convert, tables)
        op(room.select(place, 1), *given, positions[::2], *converted, h_room.select(place, 1), tickets[::2])
        return room, h_room, positions, tickets

    def double(t):
        return None if t is None else t.to(torch.float64, copy=True)

    expected = run(reference.embed_next, double(room), double(h_room), double)
    with use_backend(backend):
        found = run(embed_next, room, h_room)
    assert_close(found[:2], [t.to(dtype) for t in expected[:2]], atol=tolerance, rtol=tolerance, equal_nan=True)
    assert (~x.isnan()).sum() == batch * token_dim
    assert_close(found[2:], expected[2:])
    assert torch.equal(found[2], at.repeat(1 + guided).repeat_interleave(2) + torch.tensor([1, 0]).repeat(rows))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("channels", [1, 24, 96, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_small_ops_of_a_step_write_all_of_their_results(backend, channels):
    h, delta = draw(0, 2, 3, channels, dtype=torch.float32)
    x, z = draw(1, 2, 3, 4, 5, dtype=torch.float32)
    mu, alpha, *refs = draw(2, 4, 3, 5, dtype=torch.float32)
    ones, embedded = torch.ones(5, channels), torch.empty(6, channels)
    at, tickets = torch.tensor([0, 2, 1] * 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with use_backend(backend):
        normalized = residual_norm(h, delta, ones[0], ones[0])
        embed_next(x, z, mu, alpha, *refs, torch.ones(4), at, ones, ones[:4], None, embedded, tickets)
    assert normalized.isfinite().all()
    assert embedded.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_embed_next_goes_from_token_to_token_by_itself(backend):
    """However many programs share a sample, one of them moves its position, and leaves nothing to clear."""
    channels, steps = 300, 4
    sizes = (3, steps + 1, 2), (2, 3, 2), (2, channels), (steps + 1, channels)
    z, (mu, alpha), projection, embedding = (draw(k, *size, dtype=torch.float32) for k, size in enumerate(sizes))
    x, h = torch.zeros_like(z), torch.zeros(3, channels)
    at, tickets = torch.zeros(2, 3, dtype=torch.int32)
    with use_backend(backend):
        for i in range(1, steps + 1):
            embed_next(x, z, mu, alpha, None, None, None, at, projection, embedding, None, h, tickets)
            assert at.tolist() == [i] * 3
            assert tickets.tolist() == [0] * 3
    tokens = z[:, 1:] * alpha[:, None].exp() + mu[:, None]
    assert_close(x[:, 1:], tokens, atol=1e-4, rtol=1e-4)
    assert_close(h, tokens[:, -1] @ projection + embedding[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif("triton" not in BACKENDS, reason="what the kernel does where PyTorch raises")
@pytest.mark.parametrize("position", [-100, -2, 3, 100])
def test_a_token_that_does_not_exist_is_written_nowhere(position):
    room, x = room_for(torch.zeros(1, 4, 3), 0)
    z, token, h = torch.zeros(1, 4, 3), torch.zeros(1, 3), torch.zeros(1, 3)
    at, tickets = torch.tensor([7, position, 7], dtype=torch.int32), torch.tensor([7, 0, 7], dtype=torch.int32)
    tables = torch.eye(3), torch.zeros(4, 3), None
    with use_backend("triton"):
        embed_next(x, z, token, token, None, None, None, at[1:2], *tables, h, tickets[1:2])
    assert room.isnan().all()
    assert at.tolist() == [7, position + 1, 7]
    assert tickets.tolist() == [7, 0, 7]


# Gradients, compilers and autocast, of all ops ------------------------------------------------------------------------

STANDING, EYE = torch.tensor([0, 1], dtype=torch.int32), torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "shapes"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients(op, shapes, backend):
    if backend == "triton" and DEVICE != "cpu":
        pytest.skip("no kernel takes float64 on a GPU")
    with use_backend(backend):
        assert torch.autograd.gradcheck(op, inputs_of(shapes), fast_mode=INTERPRETED)


def second_derivatives(op, inputs):
    """First and second derivatives of a sum: the gradients that come in are constants, so all depends on the inputs."""
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
        ("causal_attention", [ATTENTION] * 3, (None, 0.3)),
        ("causal_attention", [ATTENTION] * 3, (torch.tensor([0.5, 2.0]), 0.3)),
        ("affine_forward", [TOKENS] * 3, (True,)),
        ("affine_inverse", [TOKENS] * 3, (False,)),
        ("affine_inverse", [(3,)] * 3, (False,)),
        ("mixture_logistic", MIXTURE, (-7.0,)),
        ("mixture_logistic", [(3,), *[(3, 1)] * 3], (-7.0,)),
        ("mixture_logistic_inverse", MIXTURE, (-math.inf,)),
        (
            "decode_attention",
            [ATTENTION, ATTENTION, ATTENTION, CACHES, CACHES],
            (torch.tensor([0, 3]).int(), None, 0.3),
        ),
        ("residual_norm", [TOKENS, TOKENS, (4,), (4,)], (1e-5, torch.float32)),
        (
            "embed_next",
            [TOKENS, TOKENS, *[(2, 4)] * 4, (3,)],
            (STANDING.repeat(2), EYE, EYE[:3], None, torch.zeros_like(EYE), torch.zeros_like(STANDING)),
        ),
    ],
)
def test_registration(name, shapes, rest):
    inputs = inputs_of(shapes, requires_grad=name not in IN_PLACE)
    rest = [t.to(inputs[0].device) if isinstance(t, torch.Tensor) else t for t in rest]
    library.opcheck(getattr(torch.ops.tarflow, name).default, (*inputs, *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [[1.0, 1.0], [0.3, 1.7]], ids=str)
def test_attention_of_low_precision_has_gradients_in_float32_on_a_cpu_also_under_autocast(dtype, temperature):
    """PyTorch's own backward in bfloat16 takes five times as long there, and rounds more."""
    if DEVICE != "cpu":
        pytest.skip("a GPU has kernels")
    q, k, v, grad = torch.randn(4, 2, 2, 20, 16).to(dtype).unbind()
    inputs = q, k, v, torch.tensor(temperature)
    exact, low, cast = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(3))
    with use_backend("torch"):
        wide = [tensor.float() for tensor in exact]
        causal_attention(*wide[:3], temperature=wide[3]).backward(grad.float())
        causal_attention(*low[:3], temperature=low[3]).backward(grad)
        with torch.autocast("cpu", dtype):
            causal_attention(*cast[:3], temperature=cast[3]).backward(grad)
    for expected, *gradients in zip(exact, low, cast, strict=True):
        for one in gradients:
            assert torch.equal(one.grad, expected.grad)


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
