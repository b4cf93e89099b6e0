"""The attention layer: causal, the same token by token as all at once; and the zuko flow that is made of it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import DEVICE, draw, randomize
from tarflow_kernels import KVCache, causal_attention
from tarflow_kernels.self_attention import CausalSelfAttention

pytestmark = pytest.mark.usefixtures("on_device")

EXAMPLE = Path(__file__).parents[2] / "kernels" / "examples" / "attention_in_zuko.py"
PRECISIONS = st.sampled_from([(torch.float32, 1e-5 if DEVICE == "cpu" else 2e-4), (torch.float64, 1e-10)])
SIZES = st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 8]))  # heads and their channels
SEEDS = st.integers(0, 1000)


def make(heads=2, head_dim=4, dtype=torch.float64, seed=0, bias=True):
    return randomize(CausalSelfAttention(heads * head_dim, heads, bias=bias), seed).to(dtype)


def cache_of(layer, rows, capacity):
    """One layer's cache of what nobody has written."""
    like = layer.qkv.weight
    cache = KVCache.allocate(1, rows, layer.num_heads, capacity, layer.head_dim, device=like.device, dtype=like.dtype)
    [(cache_k, cache_v)] = cache
    return cache_k.fill_(torch.nan), cache_v.fill_(torch.nan)


def at(*positions):
    return torch.tensor(positions, dtype=torch.int32)


@given(SIZES, st.integers(1, 3), st.integers(1, 12), st.data(), SEEDS)
def test_an_output_depends_on_no_later_input(size, rows, length, data, seed):
    layer, x = make(*size), draw(seed, rows, length, size[0] * size[1])
    i = data.draw(st.integers(0, length - 1))
    changed = torch.cat((x[:, : i + 1], x[:, i + 1 :] + 7), dim=1)
    assert_close(layer(changed)[:, : i + 1], layer(x)[:, : i + 1], atol=1e-12, rtol=0)


def test_every_output_depends_on_all_inputs_so_far():
    layer, x = make(), draw(0, 1, 5, 8)
    jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0].abs().amax((1, 3))
    assert_close(jacobian != 0, torch.ones(5, 5, dtype=torch.bool).tril())


def test_it_is_attention_of_its_projections():
    """Queries, keys and values are a third of the projection each, head by head."""
    layer, x = make(3, 4), draw(0, 2, 5, 12)
    q, k, v = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=2))
    out = causal_attention(q, k, v, temperature=1.3).transpose(1, 2).flatten(2)
    assert_close(layer(x, temperature=1.3), layer.proj(out))


@given(SIZES, st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=6), PRECISIONS, st.booleans(), SEEDS)
def test_decoding_in_groups_is_the_forward_pass(size, rows, groups, precision, bias, seed):
    (dtype, tolerance), length = precision, sum(groups)
    layer, x = make(*size, dtype, seed, bias), draw(seed, rows, length, size[0] * size[1], dtype=dtype)
    caches, temperature = cache_of(layer, rows, length + 2), draw(seed + 1, rows, dtype=dtype).exp()
    positions = torch.zeros(rows, dtype=torch.int32)
    outs = []
    for group in x.split(groups, dim=1):
        outs.append(layer.decode(group, *caches, positions, temperature=temperature))
        positions += group.shape[1]
    assert_close(torch.cat(outs, dim=1), layer(x, temperature=temperature), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("group", [1, 2])
def test_rows_stand_where_they_like(group):
    layer, x = make(), draw(0, 3, 6, 8)
    caches, standing = cache_of(layer, 3, 6), [0, 3, 4]
    for row, before in enumerate(standing):
        if before:
            layer.decode(x[row : row + 1, :before], *(cache[row : row + 1] for cache in caches), at(0))
    new = torch.stack([x[row, before : before + group] for row, before in enumerate(standing)])
    out, whole = layer.decode(new, *caches, at(*standing)), layer(x)
    expected = torch.stack([whole[row, before : before + group] for row, before in enumerate(standing)])
    assert_close(out, expected, atol=1e-10, rtol=0)


def test_a_temperature_for_each_row_is_that_of_the_row():
    layer, x = make(), draw(0, 2, 5, 8)
    each = torch.cat([layer(x[:1], temperature=0.5), layer(x[1:], temperature=2.0)])
    assert_close(layer(x, temperature=torch.tensor([0.5, 2.0])), each)
    assert not torch.allclose(layer(x), each)


def test_gradients_reach_the_input_the_temperature_and_every_parameter():
    layer, x, tau = make(), draw(0, 2, 3, 8).requires_grad_(), draw(1, 2).requires_grad_()
    names, weights = zip(*layer.named_parameters(), strict=True)

    def run(x, tau, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x, {"temperature": tau.exp()})

    assert torch.autograd.gradcheck(run, (x, tau, *weights))
    layer(x).square().sum().backward()
    assert all(weight.grad.count_nonzero() for weight in weights)


def test_decoding_keeps_no_graph():
    layer = make()
    caches = cache_of(layer, 1, 4)
    assert not layer.decode(draw(0, 1, 1, 8), *caches, at(0)).requires_grad
    assert not any(cache.requires_grad for cache in caches)


def test_nothing_is_copied_between_the_projections_and_attention(monkeypatch):
    layer, steps = make(), []

    def attend(*heads, **kwargs):
        out = causal_attention(*heads, **kwargs)
        steps.extend((*heads, out))
        return out

    monkeypatch.setattr("tarflow_kernels.self_attention.causal_attention", attend)
    layer.qkv.register_forward_hook(lambda module, inputs, output: steps.append(output))
    layer.proj.register_forward_hook(lambda module, inputs, output: steps.append(inputs[0]))
    layer(draw(0, 5, 2, 8).transpose(0, 1))
    projected, q, k, v, out, joined = (tensor.untyped_storage().data_ptr() for tensor in steps)
    assert (q, k, v, joined) == (projected, projected, projected, out)


def test_compiled_whole_it_is_the_same():
    torch.compiler.reset()
    layer, x, tau = make(), draw(0, 2, 5, 8), torch.tensor([0.5, 2.0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, temperature=tau), layer(x, temperature=tau))

    def decode(*args):
        return layer.decode(*args)

    caches, others = cache_of(layer, 2, 5), cache_of(layer, 2, 5)
    out = torch.compile(decode, fullgraph=True, backend="aot_eager")(x[:, :2], *others, at(0, 0))
    assert_close(out, layer.decode(x[:, :2], *caches, at(0, 0)))
    assert_close(others, caches, equal_nan=True)


def test_under_autocast_both_run_in_its_precision():
    layer, x = make(dtype=torch.float32), draw(0, 2, 5, 8, dtype=torch.float32)
    caches = [cache.bfloat16() for cache in cache_of(layer, 2, 5)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, decoded = layer(x), layer.decode(x, *caches, at(0, 0))
    assert out.dtype == decoded.dtype == torch.bfloat16
    assert_close(decoded, out, atol=0.05, rtol=0.05)
    assert_close(out.float(), layer(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_is_two_projections(bias):
    shapes = {name: tuple(tensor.shape) for name, tensor in make(bias=bias).state_dict().items()}
    weights = {"qkv.weight": (24, 8), "proj.weight": (8, 8)}
    assert shapes == weights | ({"qkv.bias": (24,), "proj.bias": (8,)} if bias else {})


def decode_with(layer, x, rows=2, capacity=4, **changes):
    cache_k, cache_v = cache_of(layer, rows, capacity)
    return layer.decode(x, **{"cache_k": cache_k, "cache_v": cache_v, "positions": at(0, 0)} | changes)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda layer, x: CausalSelfAttention(8, 3), ValueError, "num_heads"),
        (lambda layer, x: CausalSelfAttention(8, 0), ValueError, "num_heads"),
        (lambda layer, x: CausalSelfAttention(8, -2), ValueError, "num_heads"),
        (lambda layer, x: CausalSelfAttention(0, 2), ValueError, "num_heads"),
        (lambda layer, x: layer(x[0]), ValueError, "x"),
        (lambda layer, x: layer(x[..., :6]), ValueError, "x"),
        (lambda layer, x: layer(x.int()), TypeError, "x"),
        (lambda layer, x: layer(x.half()), TypeError, "x"),
        (lambda layer, x: layer(x.to("meta")), ValueError, "x"),
        (lambda layer, x: layer(x, temperature=0.0), ValueError, "temperature"),
        (lambda layer, x: layer(x, temperature=torch.ones(3)), ValueError, "temperature"),
        (lambda layer, x: layer(x, temperature=torch.ones(2).int()), TypeError, "temperature"),
        (lambda layer, x: decode_with(layer, x[0]), ValueError, "x"),
        (lambda layer, x: decode_with(layer, x.int()), TypeError, "x"),
        (lambda layer, x: decode_with(layer, x, capacity=2), ValueError, "x"),
        (lambda layer, x: decode_with(layer, x, rows=3), ValueError, "cache_k"),
        (lambda layer, x: decode_with(layer, x, cache_k=x), ValueError, "cache_k"),
        (lambda layer, x: decode_with(layer, x, cache_v=torch.zeros(2, 2, 4, 4)), TypeError, "cache_v"),
        (lambda layer, x: decode_with(layer, x, positions=at(0)), ValueError, "positions"),
        (lambda layer, x: decode_with(layer, x, positions=at(0, 0).long()), TypeError, "positions"),
        (lambda layer, x: decode_with(layer, x, temperature=-1.0), ValueError, "temperature"),
        pytest.param(
            lambda layer, x: decode_with(layer, x, positions=at(0, 2)),
            ValueError,
            "positions",
            marks=pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody looks"),
        ),
    ],
)
def test_an_error_names_the_argument(call, error, argument):
    with pytest.raises(error, match=rf"^{argument}: expected .*; got "):
        call(make(), draw(0, 2, 3, 8))


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("zuko")
    spec = importlib.util.spec_from_file_location("attention_in_zuko", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_zuko_example_learns_inverts_and_samples(example, capsys):
    """Both of its inverses agree, and the density of what it samples is finite."""
    autoregressive = pytest.importorskip("zuko").transforms.AutoregressiveTransform
    flow = example.main(features=6, channels=16, steps=10, rows=8, repeats=1).double()()
    assert "gain of the cache" in capsys.readouterr().out
    y = draw(0, 5, 6)
    for transform in flow.transform.transforms[::2]:
        x = transform.inv(y)
        assert_close(x, autoregressive(transform.meta, transform.passes).inv(y), atol=1e-10, rtol=0)
        assert_close(transform(x), y, atol=1e-10, rtol=0)
    assert flow.log_prob(flow.sample((5,))).isfinite().all()


def test_the_log_det_of_the_zuko_example_is_that_of_its_jacobian(example):
    flow, x = example.make_flow(4, 8).double(), draw(0, 4)
    with torch.no_grad():
        for seed, parameter in enumerate(flow.parameters()):
            parameter += 0.2 * draw(seed, *parameter.shape)
    transform = flow().transform
    jacobian = torch.autograd.functional.jacobian(lambda x: transform(x[None])[0], x)
    assert_close(transform.log_abs_det_jacobian(x[None], None)[0], jacobian.slogdet()[1])


def test_integers_and_flat_caches_are_named_and_autocast_takes_any_float():
    layer, positions = CausalSelfAttention(8, 2), torch.zeros(1, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.zeros(1, 3, 8, dtype=torch.float16)).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"x: expected a floating-point tensor; got torch\.int64"):
            layer(torch.zeros(1, 3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="cache_k: expected shape"):
        layer.decode(torch.zeros(1, 1, 8), torch.zeros(8), torch.zeros(8), positions)
