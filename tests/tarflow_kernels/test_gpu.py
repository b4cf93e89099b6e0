"""Claims that only a GPU can show: half precision, CUDA graphs, the compiler's own kernels, sizes that fill a card."""

import copy
import itertools

import pytest
import torch
from torch.testing import assert_close

import tarflow_kernels
from helpers import DEVICE, randomize
from tarflow import Decoder, FlowPP, FlowPPConfig, Guidance, TarFlow, TarFlowConfig
from tarflow.decoding.step import GraphRunner
from tarflow_kernels import (
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

if DEVICE == "cpu":
    pytest.skip("needs a GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]
DECODERS = [Decoder("sequential"), Decoder("jacobi", tolerance=1e-3), Decoder("jacobi", 4, tolerance=1e-3)]
every_half = pytest.mark.parametrize("dtype", HALF, ids=str)


@pytest.fixture(autouse=True)
def on_gpu():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def error(results, expected):
    """The distance of each result from its expected value, relative to that, or to the largest if that is nothing."""
    sizes = [b.double().norm() for b in expected]
    sizes = [size if size > 1e-9 * max(sizes) else max(sizes) for size in sizes]
    distances = [(a.double() - b.double()).norm() for a, b in zip(results, expected, strict=True)]
    return [(distance / size).item() for distance, size in zip(distances, sizes, strict=True)]


def no_worse_than_torch(op, inputs, dtype):
    """Check that a kernel in low precision is at most twice as far from float64 as stock PyTorch is.

    In float32 it may be 1e-5 off, which tells three products on tensor cores, that add up with less care, from one.
    """
    results = {}
    for backend, precision in (("reference", torch.float64), ("torch", dtype), ("triton", dtype)):
        with use_backend(backend):
            results[backend] = op(*(t.detach().to(precision).requires_grad_() for t in inputs))
    ours, theirs = (error(results[backend], results["reference"]) for backend in ("triton", "torch"))
    rounding = 1e-5 if dtype == torch.float32 else 1e-6
    assert all(a <= 2 * b + rounding for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "length", "head_dim"),
    [
        *itertools.product([torch.bfloat16], [1, 113, 256, 1024], [16, 24, 48, 64, 80, 96, 128, 256]),
        *itertools.product([torch.float16, torch.float32], [17, 64, 1000], [64, 128]),
    ],
    ids=str,
)
def test_attention_is_as_accurate_as_pytorch(dtype, length, head_dim):
    def op(q, k, v, grad):
        out = causal_attention(q, k, v, temperature=1.3)
        return out, *torch.autograd.grad(out, (q, k, v), grad.detach())

    qkv = torch.randn(2, length, 3, 4, head_dim).to(dtype)
    inputs = [*qkv.permute(2, 0, 3, 1, 4), torch.randn(2, 4, length, head_dim).to(dtype)]
    no_worse_than_torch(op, inputs, dtype)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("new", [1, 4, 16, 64, 100])
@every_half
def test_decoding_is_as_accurate_as_pytorch(dtype, new, rows):
    positions = torch.randint(0, 1024 - new, (rows,), dtype=torch.int32)
    temperature = torch.rand(rows) + 0.5

    def op(q, k, v, cache_k, cache_v):
        with torch.no_grad():
            return [decode_attention(q, k, v, cache_k.clone(), cache_v.clone(), positions, temperature=temperature)]

    inputs = [*torch.randn(3, rows, 12, new, 64).to(dtype), *torch.randn(2, rows, 12, 1024, 64).to(dtype)]
    no_worse_than_torch(op, inputs, dtype)


@pytest.mark.parametrize("channels", [24, 96, 768, 1000, 8192])
@pytest.mark.parametrize("full", [False, True], ids=["in low precision", "in full precision"])
@every_half
def test_residual_norm_is_as_accurate_as_pytorch(dtype, full, channels):
    """Residuals may be more precise than what is added to them and what becomes of them."""

    def op(h, delta, weight, bias):
        kept = torch.promote_types(h.dtype, torch.float32) if full else h.dtype
        h, weight, bias = (t.detach().to(kept, copy=True) for t in (h, weight, bias))
        return residual_norm(h, delta.detach(), weight, bias, dtype=delta.dtype), h

    no_worse_than_torch(op, [*torch.randn(2, 37, channels).to(dtype), *torch.randn(2, channels).to(dtype)], dtype)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("token_dim", "channels"), [(12, 768), (48, 1000), (192, 96), (256, 24)])
@every_half
def test_embedding_the_next_token_is_as_accurate_as_pytorch(dtype, token_dim, channels, guided):
    """Parameters come in low precision, as the parts of one output; all the rest is float32."""
    z, projection, embedding = torch.randn(5, 9, token_dim), torch.randn(token_dim, channels), torch.randn(9, channels)
    rows = 10 if guided else 5
    context, weights = torch.randn(rows, channels), torch.linspace(0, 2, 9)

    def op(parameters):
        full = torch.promote_types(parameters.dtype, torch.float32)
        (alpha, mu), (alpha_ref, mu_ref) = (half.chunk(2, dim=-1) for half in parameters.detach().chunk(2))
        x = torch.zeros_like(z, dtype=full)
        guidance = (mu_ref, alpha_ref, weights) if guided else (None, None, None)
        h, tables = x.new_empty(rows, channels), (t.to(full) for t in (projection, embedding, context))
        positions = torch.tensor([0, 7, 3, 3, 6] * 2, dtype=torch.int32)[:rows]
        tickets = torch.zeros(5, dtype=torch.int32)
        embed_next(x, z.to(full), mu, alpha, *guidance, positions, *tables, h, tickets)
        return h, x

    no_worse_than_torch(op, [(0.3 * torch.randn(10, 2 * token_dim)).to(dtype)], dtype)


@pytest.mark.parametrize("op", [affine_forward, affine_inverse])
@pytest.mark.parametrize("token_dim", [12, 48, 192])
@every_half
def test_affine_maps_round_nothing_but_gradients_of_half_precision(dtype, token_dim, op):
    x = torch.randn(4, 1024, token_dim, requires_grad=True)
    alpha, mu = (0.3 * torch.randn(4, 1024, 2 * token_dim)).to(dtype).requires_grad_().chunk(2, dim=-1)
    results = {}
    for backend in ("reference", "triton"):
        with use_backend(backend):
            out, logdet = op(x, mu, alpha, shift=True)
            grads = torch.autograd.grad(out.square().sum() + logdet.sum(), (x, mu, alpha))
        results[backend] = [out, logdet, *grads]
    for ours, theirs in zip(results["triton"], results["reference"], strict=True):
        tolerance = 1e-2 if ours.dtype == dtype else 1e-5
        assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("op", [mixture_logistic, mixture_logistic_inverse])
@pytest.mark.parametrize("components", [4, 10, 32])
@pytest.mark.parametrize("order", ["elements", "components"])
@every_half
def test_mixtures_round_nothing_but_gradients_of_half_precision(dtype, order, components, op):
    """Parameters are parts of the output of a convolution, channels first or last."""
    given = 3 * torch.randn(4, 3, 32, 16, requires_grad=True)
    outputs = torch.randn(4, 3, 32, 16, 2 + 3 * components).to(dtype)
    if order == "elements":
        outputs = outputs.movedim(-1, 2).contiguous().movedim(2, -1)
    outputs.requires_grad_()
    results = {}
    for backend in ("reference", "triton"):
        with use_backend(backend):
            out, logdet = op(given, *outputs[..., 2:].chunk(3, dim=-1))
            grads = torch.autograd.grad(out.sin().sum() + logdet.sum(), (given, outputs))
        results[backend] = [out, logdet, *grads]
    for ours, theirs in zip(results["triton"], results["reference"], strict=True):
        tolerance = 2e-2 if ours.dtype == dtype else 1e-3
        assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_a_mixture_in_double_precision_has_a_kernel_too():
    inputs = [torch.randn(2, 3, 5, dtype=torch.float64), *torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)]
    for op in (mixture_logistic, mixture_logistic_inverse):
        assert_close(op(*inputs), getattr(reference, op.__name__)(*inputs), atol=1e-9, rtol=1e-9)


def test_a_mixture_needs_no_memory_but_that_of_its_results():
    """Stock PyTorch holds several temporaries that are K times as large as x; neither pass of the kernels holds one."""
    x, outputs = torch.randn(64, 3, 32, 16), torch.randn(64, 3, 98, 32, 16).movedim(2, -1)
    theta = [t.requires_grad_() for t in outputs[..., 2:].chunk(3, dim=-1)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    v, logdet = mixture_logistic(x, *theta)
    assert torch.cuda.max_memory_allocated() - before <= 2 * x.nbytes
    torch.autograd.grad(v.sum() + logdet.sum(), theta)
    assert torch.cuda.max_memory_allocated() - before <= 3 * theta[0].nbytes + 6 * x.nbytes


def test_batches_beyond_a_grid_dimension():
    q, k, v = torch.randn(3, 70_000, 1, 3, 16, dtype=torch.bfloat16)
    x, mu, alpha = torch.randn(3, 70_000, 5)
    for op, inputs in ((causal_attention, (q, k, v)), (affine_forward, (x, mu, alpha))):
        expected = getattr(reference, op.__name__)(*(t.float() for t in inputs))
        result = op(*inputs)
        assert_close(result, expected, atol=2e-2, rtol=2e-2, check_dtype=False)


def test_tensors_of_more_than_two_to_the_31_elements():
    q = torch.randn(70, 8, 64, 64, dtype=torch.bfloat16)
    wide = torch.empty(70, 2**25, dtype=torch.bfloat16)[:, -8 * 64 * 64 :].view(70, 8, 64, 64)
    assert wide.stride(0) * 70 > 2**31
    wide.copy_(q)
    assert_close(causal_attention(wide, wide, wide), causal_attention(q, q, q), atol=0, rtol=0)
    x = torch.zeros(2**17 + 1, 2**14, dtype=torch.bfloat16)
    x[-1] = 1
    z, logdet = affine_forward(x, x, x)
    assert z.numel() > 2**31
    assert_close(z[-1], torch.zeros(2**14))
    assert_close(logdet[-2:], torch.tensor([0.0, -(2.0**14)]))


def test_gradients_are_the_same_bit_for_bit_every_time():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 32, 12, 1024, 64, dtype=torch.bfloat16))

    def run():
        out = causal_attention(q, k, v)
        return torch.autograd.grad(out.float().square().sum(), (q, k, v))

    first = run()
    for _ in range(5):
        assert_close(run(), first, atol=0, rtol=0)


def test_one_graph_serves_every_position():
    q, k, v = torch.randn(3, 4, 12, 1, 64, dtype=torch.bfloat16)
    caches = torch.randn(2, 4, 12, 300, 64, dtype=torch.bfloat16)
    positions = torch.zeros(4, dtype=torch.int32)
    own = caches.clone()
    out, graph = captured(lambda: decode_attention(q, k, v, *own, positions))
    for standing in ([0, 1, 2, 3], [299, 0, 100, 17]):
        positions.copy_(torch.tensor(standing, dtype=torch.int32))
        own.copy_(caches)
        graph.replay()
        expected = reference.decode_attention(q, k, v, *caches.clone(), positions)
        assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("channels", [96, 768])
def test_one_graph_goes_from_token_to_token(channels):
    """The ops between the products of a decoding step read the position on the device, and move it."""
    z, (mu, alpha, mu_ref, alpha_ref) = torch.randn(4, 9, 48), 0.3 * torch.randn(4, 4, 48)
    delta, (weight, bias) = torch.randn(8, channels), torch.randn(2, channels)
    weights, projection, embedding = torch.randn(9), torch.randn(48, channels), torch.randn(9, channels)

    def start():
        """Tokens, positions, activations and tickets before the first step."""
        positions, tickets = (torch.zeros(count, dtype=torch.int32) for count in (8, 4))
        return torch.zeros(4, 9, 48), positions, torch.zeros(8, channels), tickets

    def step(ops, x, positions, h, tickets):
        ops.embed_next(x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, None, h, tickets)
        return ops.residual_norm(h, delta, weight, bias)

    state, expected_state = start(), start()
    y, graph = captured(lambda: step(tarflow_kernels, *state))
    for tensor, fresh in zip(state, start(), strict=True):
        tensor.copy_(fresh)
    for _ in range(8):
        graph.replay()
        expected_y = step(reference, *expected_state)
        assert_close((y, *state), (expected_y, *expected_state), atol=1e-4, rtol=1e-4)


def test_every_sample_moves_once_however_many_programs_read_where_it_stands():
    """A thousand steps of many programs each: a position moved too early, or twice, would show in x."""
    samples, steps, channels = 64, 1000, 768
    z = torch.randn(samples, steps + 1, 12)
    x, h = torch.zeros_like(z), torch.empty(2 * samples, channels)
    identity = *torch.zeros(4, samples, 12), torch.zeros(steps + 1)
    positions, tickets = (torch.zeros(count, dtype=torch.int32) for count in (2 * samples, samples))
    projection, embedding = torch.randn(12, channels), torch.randn(steps + 1, channels)
    for i in range(1, steps + 1):
        embed_next(x, z, *identity, positions, projection, embedding, None, h, tickets)
        if i % 100 == 0:
            expected = z[:, i] @ projection + embedding[i]
            assert_close(h, expected.repeat(2, 1), atol=1e-2, rtol=1e-2)
    assert_close(x[:, 1:], z[:, 1:], atol=0, rtol=0)
    assert (positions == steps).all()
    assert not tickets.any()


@pytest.mark.parametrize("guidance", [None, Guidance(1.5)], ids=["unguided", "guided"])
@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("coupling", ["affine", "mixture"])
def test_replayed_graphs_decode_as_launched_kernels_do(monkeypatch, coupling, decoder, guidance):
    flow = small_model(num_classes=3, coupling=coupling).flow
    z, labels = torch.randn(5, 16, 48), torch.tensor([0, 1, 2, -1, 0])
    reports: dict[bool, list[int]] = {}
    tokens = []
    for launched in (True, False):
        monkeypatch.setattr(GraphRunner, "WARM_UP", 10**6 if launched else 2)
        passes = reports.setdefault(launched, [])
        tokens.append(
            flow.inverse(z, labels, guidance, decoder, lambda done, passes=passes: passes.append(done.passes))
        )
    assert_close(*tokens, atol=1e-4, rtol=1e-4)
    assert reports[True] == reports[False]


@pytest.mark.parametrize("guidance", [None, Guidance(1.5)], ids=["unguided", "guided"])
@pytest.mark.parametrize("coupling", ["affine", "mixture"])
def test_two_halves_on_two_streams_decode_as_the_whole_batch(monkeypatch, coupling, guidance):
    flow = small_model(num_classes=3, coupling=coupling).flow
    z, labels = torch.randn(5, 16, 48), torch.tensor([0, 1, 2, -1, 0])
    tokens = []
    for chains in (1, 2, 2):
        monkeypatch.setattr("tarflow.decoding.sequential.count_chains", lambda *sizes, chains=chains: chains)
        tokens.append(flow.inverse(z, labels, guidance, "sequential"))
    assert_close(tokens[1], tokens[0], atol=1e-4, rtol=1e-4)
    assert_close(tokens[2], tokens[1], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_decoders_agree_with_float64_on_the_reference(decoder, dtype):
    model = small_model(num_classes=3)
    z, labels, guidance = torch.randn(5, 16, 48), torch.tensor([0, 1, 2, -1, 0]), Guidance(1.0)
    with use_backend("reference"):
        expected = copy.deepcopy(model).double().flow.inverse(z.double(), labels, guidance, "sequential")
    with torch.autocast(DEVICE, dtype, enabled=dtype == torch.bfloat16):
        tokens = model.flow.inverse(z, labels, guidance, decoder)
    rounding = 1e-3 if dtype == torch.float32 else 0.1
    assert (tokens - expected).square().mean().sqrt() <= rounding + decoder.tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flowpp_scores_as_on_a_cpu_and_its_images_return(dtype):
    config = FlowPPConfig(image_size=16, in_channels=3, num_mixtures=32, stack="stripe2 squeeze channel2")
    pixels = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    model = FlowPP(config)
    model.initialize(pixels)
    x = model.dequantize(pixels)[0].detach()
    expected = copy.deepcopy(model).cpu().double().log_prob(x.cpu().double())
    with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=dtype == torch.bfloat16):
        z, _ = model(x)
        scores = model.log_prob(x)
        back = model.inverse(z)
    per_value = (scores.cpu() - expected).abs().max() / config.num_dims
    assert per_value < (1e-4 if dtype == torch.float32 else 0.05)
    assert ((back - x) * 128).abs().max() < 0.05


def test_a_training_step_is_captured_whole():
    model, x = small_model(), torch.randn(4, 3, 16, 16)
    twin = copy.deepcopy(model)

    def loss(model):
        with torch.autocast(DEVICE, torch.bfloat16):
            z, logdet = model(x)
        return z.square().mean() - logdet.mean() / model.config.num_dims

    def step():
        result = loss(model)
        result.backward()
        return result

    result, graph = captured(step, before=lambda: model.zero_grad(set_to_none=True))
    for parameter in model.parameters():
        parameter.grad.zero_()
    graph.replay()
    expected = loss(twin)
    expected.backward()
    gradients = ([p.grad for p in each.parameters()] for each in (model, twin))
    # A capture may choose other algorithms for its products, which round bfloat16 in another order.
    assert max(error([result], [expected]) + error(*gradients)) <= 2e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_whole_model_compiles_forward_and_backward_without_a_break(mode):
    model, x = small_model(), torch.randn(4, 3, 16, 16)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, mode=mode)):
        model.zero_grad()
        z, logdet = run(x)
        (z.square().mean() - logdet.mean() / model.config.num_dims).backward()
        results.append([z.clone(), logdet.clone(), *(p.grad.clone() for p in model.parameters())])
    assert max(error(*reversed(results))) <= 1e-3


def test_the_device_picks_triton_and_only_where_it_has_a_kernel(monkeypatch):
    seen = []
    from tarflow_kernels import dispatch

    for name, backend in itertools.product(("causal_attention", "residual_norm"), ("torch", "triton")):
        run = dispatch.implementations[name][backend]
        monkeypatch.setitem(
            dispatch.implementations[name],
            backend,
            lambda *args, run=run, backend=backend: seen.append(backend) or run(*args),
        )
    half, double = torch.ones(1, 1, 2, 16, dtype=torch.bfloat16), torch.ones(1, 1, 2, 16, dtype=torch.float64)
    causal_attention(half, half, half)
    causal_attention(double, double, double)
    for channels in (8, 8200):
        residual_norm(torch.ones(2, channels), None, *torch.ones(2, channels))
    assert seen == ["triton", "torch", "triton", "torch"]


def small_model(**options):
    sizes = {"image_size": 16, "in_channels": 3, "patch_size": 4, "channels": 128, "num_blocks": 2}
    config = TarFlowConfig(**sizes, layers_per_block=2, **options)
    return randomize(TarFlow(config).cpu()).to(DEVICE)


def captured(run, before=lambda: None):
    """Record a function that has run before, and return its result and the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph
