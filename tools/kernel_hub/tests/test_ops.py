"""Ops as the Kernel Hub serves them agree with their formulas in float64."""

import pytest
import torch

import kernels

flow = kernels.get_kernel("OWNER/tarflow-kernels", version=0)

DEVICE = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
HEADS, TOKENS, THETA = (2, 4, 33, 32), (2, 9, 12), (2, 9, 12, 5)
CASES = {
    "causal_attention": [HEADS] * 3,
    "affine_forward": [TOKENS] * 3,
    "affine_inverse": [TOKENS] * 3,
    "mixture_logistic": [TOKENS, THETA, THETA, THETA],
    "mixture_logistic_inverse": [TOKENS, THETA, THETA, THETA],
    "residual_norm": [(6, 64), (6, 64), (64,), (64,)],
}


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def single(tensors):
    return [tensor.to(DEVICE, torch.float32) for tensor in tensors]


def agree(results, expected):
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-3, check_device=False, check_dtype=False)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", CASES)
def test_an_op_is_its_formula(name):
    inputs = draw(*CASES[name])
    agree(getattr(flow, name)(*single(inputs)), getattr(flow.reference, name)(*inputs))


@pytest.mark.kernels_ci
def test_decoding_is_attention_by_steps():
    q, k, v = draw(HEADS, HEADS, HEADS)
    cache = [torch.zeros(HEADS, device=DEVICE) for _ in range(2)]
    steps = []
    for i in range(HEADS[2]):
        positions = torch.full((2,), i, dtype=torch.int32, device=DEVICE)
        token = single(t[:, :, i : i + 1] for t in (q, k, v))
        steps.append(flow.decode_attention(*token, *cache, positions))
    agree(torch.cat(steps, 2), flow.reference.causal_attention(q, k, v))


@pytest.mark.kernels_ci
def test_an_op_is_compiled_without_a_graph_break():
    inputs = single(draw(*CASES["affine_forward"]))
    compiled = torch.compile(flow.affine_forward, fullgraph=True, backend="aot_eager")
    agree(compiled(*inputs), flow.affine_forward(*inputs))
