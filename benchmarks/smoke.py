"""Every kernel once, forward and backward where there is one, each against the formula: what one does first on a card.

A case yields what it found: a name, the error, and how much of it is allowed, which is twice that of plain torch in the
same precision. Whoever runs a case does so in a process of its own, since a kernel can hang or lose the GPU.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import device as devices
from processes import tell
from tarflow import Decoder, Guidance, TarFlow, TarFlowConfig
from tarflow_kernels import (
    affine_forward,
    affine_inverse,
    causal_attention,
    decode_attention,
    embed_next,
    mixture_logistic,
    mixture_logistic_inverse,
    residual_norm,
    use_backend,
)

Finding = tuple[str, float, float]
Case = Callable[[torch.device, torch.dtype], Iterator[Finding]]
# Sums in another order, and three products on tensor cores in place of one.
ROUNDING = 1e-5
MODEL = TarFlowConfig(
    image_size=16, in_channels=3, patch_size=4, channels=128, num_blocks=2, layers_per_block=2, num_classes=3
)
LABELS = torch.tensor([0, 1, 2, -1])


def run(name: str, device: torch.device) -> None:
    """Run a case, and tell each finding.

    Raises:
        SystemExit: something is wrong.
    """
    torch.manual_seed(0)
    wrong = []
    with device:
        for what, error, allowed in cases(device)[name](device):
            tell(found=what, error=error, allowed=allowed)
            if not error <= allowed:
                wrong.append(f"{what} is wrong: error {error:.1e}, of which {allowed:.1e} is allowed")
    if wrong:
        raise SystemExit("; ".join(wrong))


def cases(device: torch.device) -> dict[str, Callable[[torch.device], Iterator[Finding]]]:
    """Name the cases of a device, in the precisions in which models use them there."""
    if device.type != "cuda":
        return _in_precision(torch.float32)
    return _in_precision(torch.bfloat16) | {"decoding step in a graph": graph} | _in_precision(torch.float32)


def _in_precision(dtype: torch.dtype) -> dict[str, Callable[[torch.device], Iterator[Finding]]]:
    name = str(dtype).removeprefix("torch.")
    return {f"{case}, {name}": partial(run_case, dtype=dtype) for case, run_case in CASES.items()}


def compare(op: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], names: str) -> Iterator[Finding]:
    """Compare an op, run as the device runs it, with plain torch and with the formula in float64."""
    ours = op(*inputs)
    with use_backend("torch"):
        plain = op(*inputs)
    with use_backend("reference"):
        exact = op(*(t.double() if t.is_floating_point() else t for t in inputs))
    yield from _findings(names.split(), ours, plain, exact)


def _findings(names: Iterable[str], *results: Iterable[Tensor]) -> Iterator[Finding]:
    for name, ours, plain, exact in zip(names, *results, strict=True):
        yield name, relative_error(ours, exact), 2 * relative_error(plain, exact) + ROUNDING


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return ``|result - expected| / |expected|`` in Euclidean norm."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def _with_gradients(op: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the outputs of an op and the gradients of its inputs, for a loss in which no output is like another."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = op(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs)
        return *outputs, *torch.autograd.grad(loss, leaves)

    return run


def attention(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Attend, and compute the gradients, with heads of 64 in 256 tokens, and with a ragged end."""
    for length in (256, 100):
        qkv = torch.randn(2, length, 3, 3, 64).to(dtype).permute(2, 0, 3, 1, 4)
        op = _with_gradients(partial(causal_attention, temperature=1.3))
        yield from compare(op, list(qkv), "out dq dk dv")


def decoding(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Attend against the cache: one new token and sixteen, of many rows and of one, whose cache is split."""
    for rows, new in ((4, 1), (4, 16), (1, 1)):
        q, k, v = torch.randn(rows, new, 3, 12, 64).to(dtype).permute(2, 0, 3, 1, 4)
        caches = torch.randn(2, rows, 12, 1024, 64).to(dtype)
        positions = torch.linspace(1024 - new, 0, rows).int()

        def op(q, k, v, cache_k, cache_v, positions):
            cache_k, cache_v = cache_k.clone(), cache_v.clone()
            return decode_attention(q, k, v, cache_k, cache_v, positions), cache_k, cache_v

        yield from compare(op, [q, k, v, *caches, positions], "out keys values")


def affine(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Map in both directions, with parameters that are halves of an output, and compute the gradients."""
    x = torch.randn(4, 256, 12)
    alpha, mu = (0.3 * torch.randn(4, 256, 24)).to(dtype).chunk(2, dim=-1)
    for op, out in ((affine_forward, "z"), (affine_inverse, "x")):
        names = f"{out} logdet d{out} dmu dalpha"
        yield from compare(_with_gradients(partial(op, shift=True)), [x, mu, alpha], names)


def mixture(device: torch.device, dtype: torch.dtype, order: str) -> Iterator[Finding]:
    """Map a mixture in both directions, channels first or last, and compute the gradients."""
    x, outputs = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16, 96).to(dtype)
    if order == "elements":
        outputs = outputs.movedim(-1, 2).contiguous().movedim(2, -1)
    theta = outputs.chunk(3, dim=-1)
    for op, out in ((mixture_logistic, "v"), (mixture_logistic_inverse, "x")):
        names = f"{out} logdet d{out} dlogits dmeans dlog_scales"
        yield from compare(_with_gradients(op), [x, *theta], names)


def norm(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Add a residual, and normalize."""

    def op(h, delta, weight, bias):
        h = h.clone()
        return residual_norm(h, delta, weight, bias, dtype=delta.dtype), h

    h, (weight, bias) = torch.randn(64, 768), torch.randn(2, 768)
    yield from compare(op, [h, torch.randn(64, 768).to(dtype), weight, bias], "out h")


def embedding(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Decode the next token under guidance, embed it, and move the positions."""
    z, projection, table, context = (torch.randn(shape) for shape in ((5, 9, 12), (12, 768), (9, 768), (10, 768)))
    parameters = (0.3 * torch.randn(10, 24)).to(dtype)
    standing, weights = torch.tensor(2 * [0, 7, 3, 3, 6], dtype=torch.int32), torch.linspace(0, 2, 9)

    def op(z, parameters, weights, standing, projection, table, context):
        (alpha, mu), (alpha_ref, mu_ref) = (half.chunk(2, dim=-1) for half in parameters.chunk(2))
        x, h, tickets = torch.zeros_like(z), torch.empty_like(context), torch.zeros_like(standing[:5])
        guidance, positions = (mu_ref, alpha_ref, weights), standing.clone()
        embed_next(x, z, mu, alpha, *guidance, positions, projection, table, context, h, tickets)
        return h, x, positions

    yield from compare(op, [z, parameters, weights, standing, projection, table, context], "h x positions")


def sampling(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Decode a small model in sequence and in parallel, under guidance."""
    model = _small_model(device)
    z, guidance = torch.randn(4, model.config.num_tokens, model.config.token_dim), Guidance(1.0)
    with use_backend("reference"):
        exact = copy.deepcopy(model).double().flow.inverse(z.double(), LABELS.to(device), guidance, "sequential")
    for decoder in (Decoder("sequential"), Decoder("jacobi", tolerance=1e-4)):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = model.flow.inverse(z, LABELS.to(device), guidance, decoder)
        yield decoder.name, relative_error(tokens, exact), 0.1 if dtype == torch.bfloat16 else 2e-3


def training(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Compute the latents of a small model, and the gradients of its loss."""
    model = _small_model(device)
    x = torch.randn(4, model.config.in_channels, model.config.image_size, model.config.image_size)

    def step(model: TarFlow, x: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = model(x, LABELS.to(device))
        loss = z.square().mean() - logdet.mean() / model.config.num_dims
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return z, torch.cat([gradient.flatten() for gradient in gradients])

    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        ours = step(model, x)
        with use_backend("torch"):
            plain = step(model, x)
    with use_backend("reference"):
        exact = step(copy.deepcopy(model).double(), x.double())
    yield from _findings(("z", "gradients"), ours, plain, exact)


def graph(device: torch.device) -> Iterator[Finding]:
    """Capture the attention of a decoding step in a graph, and replay it at two other positions."""
    q, k, v = torch.randn(3, 4, 12, 1, 64, dtype=torch.bfloat16)
    caches, positions = torch.randn(2, 4, 12, 300, 64, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32)
    own, out = caches.clone(), torch.empty_like(q)
    replayed = devices.captured(devices.Timed(lambda: out.copy_(decode_attention(q, k, v, *own, positions))))
    for standing in ([0, 1, 2, 3], [299, 0, 100, 17]):
        positions.copy_(torch.tensor(standing))
        own.copy_(caches)
        replayed.run()
        exact = (t.double() for t in (q, k, v, *caches))
        with use_backend("reference"):
            expected = decode_attention(*exact, positions)
        yield f"at {standing}", relative_error(out, expected), 1e-2


CASES: dict[str, Case] = {
    "attention": attention,
    "decoding": decoding,
    "mixture, channels first": partial(mixture, order="elements"),
    "mixture, channels last": partial(mixture, order="components"),
    "affine": affine,
    "embedding": embedding,
    "norm": norm,
    "sampling": sampling,
    "training": training,
}


def _small_model(device: torch.device) -> TarFlow:
    with device:
        model = TarFlow(MODEL)
    for block in model.flow.blocks:
        nn.init.normal_(block.transformer.proj_out.weight, std=0.02)
    return model
