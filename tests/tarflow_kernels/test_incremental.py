"""The incremental inverse, of masked networks of any form against as many passes as there are features, in float64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import DEVICE
from tarflow_kernels import MaskedNetwork, fixed_point_inverse, incremental, incremental_inverse

MANY = (incremental.FEW_ROWS if DEVICE == "cpu" else incremental.FEW_ROWS_ON_GPU) + 1


def masked_linear(mask):
    """A linear layer with a mask, as the libraries have them; of larger weights, so that all features matter."""
    layer = nn.Linear(*reversed(mask.shape), dtype=torch.float64)
    layer.mask = mask
    nn.init.normal_(layer.weight, std=2 / mask.shape[1] ** 0.5)
    return layer


def chain(order, width, depth, parameters, *, residual=False, skip=False, context=None, **options):
    """A MADE whose features come in an order, equal numbers being independent, as a network and as a function."""
    features, generations = len(order), int(order.max()) + 1
    known = torch.full((0 if context is None else context.shape[1],), -1)
    inputs = torch.cat([known, order] if options.get("context_first") else [order, known])
    wanted = order.repeat(parameters) if options.get("parameters_first") else order.repeat_interleave(parameters)
    layers, sees = [], inputs
    for k in range(depth):
        hidden = (torch.arange(width) % max(generations - 1, 1))[torch.randperm(width)]
        layers.append(masked_linear(hidden[:, None] >= sees))
        sees = torch.maximum(sees, hidden) if residual and k else hidden
    last, direct = masked_linear(wanted[:, None] > sees), masked_linear(wanted[:, None] > inputs)
    network = MaskedNetwork(features, context, **options)
    h = 0
    for k, layer in enumerate(layers):
        before, h = h, network.map(torch.tanh, network.linear((h, layer)))
        if residual and k:
            h = network.map(torch.add, before, h)
    network.linear((h, last), *([(0, direct)] if skip else []))

    def whole(x):
        x = x if context is None else torch.cat([context, x] if options.get("context_first") else [x, context], 1)
        h = x
        for k, layer in enumerate(layers):
            before, h = h, torch.tanh(apply(layer, h))
            if residual and k:
                h = before + h
        out = apply(last, h) + apply(direct, x) if skip else apply(last, h)
        if options.get("parameters_first"):
            return out.unflatten(1, (parameters, features)).transpose(1, 2)
        return out.unflatten(1, (features, parameters))

    return network, whole


def apply(layer, x):
    return F.linear(x, layer.weight * layer.mask, layer.bias)


def inverse(y, parameters, features):
    """The inverse of ``y = x exp(tanh(b)) + a``."""
    return (y - parameters[..., 0]) * torch.exp(-torch.tanh(parameters[..., 1]))


def by_passes(whole, y):
    """Invert as the libraries do."""
    x = torch.zeros_like(y)
    for _ in range(y.shape[1]):
        x = inverse(y, whole(x), None)
    return x


@pytest.fixture(autouse=True)
def on_the_device_in_poisoned_memory(monkeypatch):
    """Memory that is allocated without being written holds NaN; no problem is too small to be solved step by step."""
    monkeypatch.setattr(incremental, "FEW_PRODUCTS", 0)
    torch.set_default_device(DEVICE)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_device(None)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([0, 1, 3, MANY, MANY + 3]),
    few_products=st.sampled_from([0, 8e6]),
    windows=st.sampled_from([(8, 32), (4, 16), (2, 4), (1, 1)]),
)
def test_it_inverts_networks_of_any_order_depth_and_form(data, seed, rows, few_products, windows):
    torch.manual_seed(seed)
    features = data.draw(st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 33, 41]))
    generations = data.draw(st.integers(1, features))
    order = torch.randperm(features) * generations // features
    context = torch.randn(rows, 3, dtype=torch.float64) if data.draw(st.booleans()) else None
    network, whole = chain(
        order,
        width=data.draw(st.integers(1, 40)),
        depth=data.draw(st.integers(1, 4)),
        parameters=2,
        residual=data.draw(st.booleans()),
        skip=data.draw(st.booleans()),
        context=context,
        context_first=data.draw(st.booleans()),
        parameters_first=data.draw(st.booleans()),
    )
    y, calls = torch.randn(rows, features, dtype=torch.float64), []
    with torch.no_grad(), mock.patch.multiple(incremental, FEW_PRODUCTS=few_products, WINDOWS=windows):
        x, parameters = incremental_inverse(network, y, lambda *args: calls.append(args[0].shape[1]) or inverse(*args))
        torch.testing.assert_close(x, by_passes(whole, y), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(parameters, whole(x), rtol=1e-10, atol=1e-10)
    assert len(calls) <= (generations if few_products else 2 * generations)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    features=st.integers(2, 20),
    density=st.floats(0.05, 0.9),
    rows=st.sampled_from([2, MANY]),
)
def test_the_order_of_a_graph_is_read_from_its_masks(seed, features, density, rows):
    torch.manual_seed(seed)
    shuffle = torch.randperm(features)
    graph = (torch.rand(features, features) < density).tril(-1)[shuffle][:, shuffle].repeat_interleave(2, 0)
    layer = masked_linear(graph & (torch.rand(graph.shape) < 0.7))  # shift and scale may see different features
    network = MaskedNetwork(features)
    network.linear((0, layer))

    def whole(x):
        return apply(layer, x).unflatten(1, (features, 2))

    y = torch.randn(rows, features, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(incremental_inverse(network, y, inverse)[0], by_passes(whole, y))


def test_a_residual_may_be_complete_later_than_what_it_is_added_to():
    """Both of its units see two features, in the order in which they lie where one of them sees a single feature."""
    first, second = masked_linear(torch.tensor([[1, 0, 0], [1, 1, 0]])), masked_linear(torch.ones(2, 2))
    last, direct = (masked_linear(torch.zeros(6, size)) for size in (2, 3))
    last.mask[4:], direct.mask[2:4, 0] = 1, 1  # each feature depends on the one before
    network = MaskedNetwork(3)
    h = network.map(torch.tanh, network.linear((0, first)))
    h = network.map(torch.add, h, network.map(torch.tanh, network.linear((h, second))))
    network.linear((h, last), (0, direct))

    def whole(x):
        h = torch.tanh(apply(first, x))
        return (apply(last, h + torch.tanh(apply(second, h))) + apply(direct, x)).unflatten(1, (3, 2))

    y = torch.randn(MANY, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(incremental_inverse(network, y, inverse)[0], by_passes(whole, y))


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.mm):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **kwargs or {})


def test_the_work_is_less_than_that_of_one_pass():
    """Each unit is evaluated once, and a good part of the masks' zeros are never multiplied."""
    network, whole = chain(torch.arange(32), width=96, depth=3, parameters=2)
    y = torch.randn(100, 32, dtype=torch.float64)
    incremental_inverse(network, y, inverse)  # which also reads the masks, once
    with torch.no_grad():
        with Products() as one_pass:
            whole(y)
        with Products() as ours:
            incremental_inverse(network, y, inverse)
    assert 0.5 < ours.count / one_pass.count < 0.7


def test_independent_features_are_found_in_one_step():
    network, _ = chain(torch.tensor([0, 0, 0, 1, 1]), width=8, depth=2, parameters=2)
    steps = []
    incremental_inverse(
        network,
        torch.randn(MANY, 5, dtype=torch.float64),
        lambda y, parameters, features: steps.append(features.tolist()) or inverse(y, parameters, features),
    )
    assert steps == [[0, 1, 2], [3, 4]]


def test_small_problems_are_solved_by_passes(monkeypatch):
    """There are as many passes as steps, at rest or not, after which all is exact."""
    monkeypatch.setattr(incremental, "FEW_PRODUCTS", 8e6)
    network, whole = chain(torch.tensor([2, 0, 1]), width=8, depth=2, parameters=2)
    y, passes = torch.randn(MANY, 3, dtype=torch.float64), []
    x, parameters = incremental_inverse(
        network, y, lambda y, parameters, features: passes.append(len(features)) or inverse(y, parameters, features)
    )
    assert passes == [3, 3, 3]
    with torch.no_grad():
        torch.testing.assert_close(x, by_passes(whole, y))
        torch.testing.assert_close(parameters, whole(x))


def test_a_network_that_does_not_come_to_rest_is_inverted_step_by_step():
    """Few rows are tried by fixed-point iteration, which finds one feature per pass where each depends on the last."""
    network, whole = chain(torch.arange(24), width=23, depth=1, parameters=2, skip=True)
    passes = []
    y = torch.randn(2, 24, dtype=torch.float64)
    x, _ = incremental_inverse(
        network, y, lambda y, parameters, features: passes.append(len(features)) or inverse(y, parameters, features)
    )
    assert passes == [24] * 6 + [1] * 24
    with torch.no_grad():
        torch.testing.assert_close(x, by_passes(whole, y))


@pytest.mark.parametrize("rows", [2, MANY])
def test_masks_that_change_are_read_again(rows):
    layer = masked_linear(torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]]))
    network = MaskedNetwork(2)
    network.linear((0, layer))
    y = torch.randn(rows, 2, dtype=torch.float64)

    def agrees():
        with torch.no_grad():
            expected = by_passes(lambda x: apply(layer, x).unflatten(1, (2, 2)), y)
            return torch.allclose(incremental_inverse(network, y, inverse)[0], expected)

    assert agrees()
    layer.mask = torch.tensor([[0, 1], [0, 1], [0, 0], [0, 0]])
    assert agrees()
    layer.mask.copy_(torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]]))
    assert agrees()


def test_networks_of_the_same_layer_are_told_apart():
    """The layer has three inputs and six outputs, of which the last sees the first."""
    mask = torch.zeros(6, 3)
    mask[5, 0] = 1
    layer = masked_linear(mask)
    context = torch.randn(MANY, 1, dtype=torch.float64)
    for features, options in [
        (2, {"context": context}),
        (2, {"context": context, "context_first": True}),
        (2, {"context": context, "parameters_first": True}),
        (3, {}),
    ]:
        network = MaskedNetwork(features, **options)
        network.linear((0, layer))
        y = torch.randn(MANY, features, dtype=torch.float64)
        x, _ = incremental_inverse(network, y, lambda y, parameters, features: y - parameters.sum(-1))
        inputs = [x, context][: 4 - features]
        made = apply(layer, torch.cat(inputs[::-1] if options.get("context_first") else inputs, 1))
        apart = (-1, features) if options.get("parameters_first") else (features, -1)
        shift = made.unflatten(1, apart).sum(1 if options.get("parameters_first") else 2)
        torch.testing.assert_close(x + shift, y)


@pytest.mark.parametrize("rows", [2, MANY])
@pytest.mark.parametrize(
    "context", [torch.autocast(DEVICE, torch.bfloat16), torch.device("meta"), torch.inference_mode()]
)
def test_it_does_not_care_what_it_is_called_in(context, rows):
    """Autocast would round it, and a default device or mode be taken for that of the tensors."""
    network, whole = chain(torch.arange(6), width=16, depth=2, parameters=2)
    for layer in network.layers:
        layer.float()
    y = torch.randn(rows, 6)
    with context:
        x, _ = incremental_inverse(network, y, inverse)
    with torch.no_grad():
        torch.testing.assert_close(x, by_passes(whole, y), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(incremental_inverse(network, y, inverse)[0], x)


def test_a_fixed_point_is_known_by_nothing_changing():
    calls = []
    x, rests = fixed_point_inverse(lambda x: calls.append(x) or (x / 2).round(), torch.tensor([64.0]), 50)
    assert (x.item(), rests, len(calls)) == (0.0, True, 8)
    x, rests = fixed_point_inverse(lambda x: x + 1, torch.zeros(1), 5)
    assert (x.item(), rests) == (5.0, False)


def one_layer(mask):
    """A network of one layer."""
    network = MaskedNetwork(2)
    network.linear((0, masked_linear(torch.tensor(mask))))
    return network


@pytest.mark.parametrize(
    ("mask", "y", "error", "message"),
    [
        ([[0, 0], [1, 0]], (3, 5), ValueError, r"y: expected shape \(B, 2\); got \(3, 5\)"),
        ([[0, 0], [1, 0]], (3, 2, 2), ValueError, r"y: expected shape \(B, 2\); got \(3, 2, 2\)"),
        ([[0, 1], [1, 0]], (3, 2), ValueError, "network: expected masks by which no feature depends"),
        ([[0, 0], [1, 0], [1, 0]], (3, 2), ValueError, "network: expected as many outputs .* got 3"),
    ],
)
def test_bad_arguments_are_named(mask, y, error, message):
    with pytest.raises(error, match=message):
        incremental_inverse(one_layer(mask), torch.zeros(y, dtype=torch.float64), inverse)


def test_other_dtypes_devices_and_contexts_of_other_rows_are_named():
    with pytest.raises(ValueError, match=r"y: expected the device of network, .*; got meta"):
        incremental_inverse(one_layer([[0, 0], [1, 0]]), torch.zeros(3, 2, dtype=torch.float64, device="meta"), inverse)
    with pytest.raises(TypeError, match=r"y: expected the dtype of the network, torch\.float64; got torch\.float32"):
        incremental_inverse(one_layer([[0, 0], [1, 0]]), torch.zeros(3, 2), inverse)
    network, _ = chain(torch.arange(2), width=4, depth=1, parameters=2, context=torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="context: expected as many rows as y, 3; got 4"):
        incremental_inverse(network, torch.zeros(3, 2, dtype=torch.float64), inverse)
