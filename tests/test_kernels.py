"""Every op of tarflow_kernels computes its formula: any shape, strides, precision and backend, and its gradients."""

import math

import pytest
import tarflow_kernels as kernels
import torch
from helpers import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tarflow_kernels import KVCache, affine_forward, affine_inverse, causal_attention, decode_attention
from tarflow_kernels import dispatch, guided_affine_inverse, use_backend

LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 113])
HEAD_DIMS = st.sampled_from([16, 24, 32, 64, 96, 128])
BATCHES = st.sampled_from([0, 1, 2, 3])
SEEDS = st.integers(0, 1000)
PRECISIONS = st.sampled_from([(torch.float64, 1e-11), (torch.float32, 1e-4)])
few = settings(max_examples=30)

# The same numbers in other places of the memory, with NaN around them where a layout leaves room.
ATTENTION_LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "one of a fused (B, N, 3, H, D)": lambda t: between_nans(t.transpose(1, 2), 2).transpose(1, 2),
    "heads last": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
}
AFFINE_LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "one half of a network's output": lambda t: between_nans(t, t.dim() - 1).contiguous(),
    "every third value": lambda t: between_nans(t, t.dim()),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "token by token": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}
COTANGENTS = {
    "plain": torch.ones_like,
    "of a sum, stride 0": lambda t: t.new_ones(()).expand(t.shape),
    "transposed": lambda t: draw(9, *t.shape[::-1], dtype=t.dtype).permute(*range(t.dim())[::-1]),
}


def between_nans(t, dim):
    nans = torch.full_like(t, math.nan)
    return torch.stack((nans, t, nans), dim).select(dim, 1)


def layouts(table):
    return st.sampled_from(sorted(table)).map(table.get)


def affine_shapes(least):
    return st.sampled_from([s for s in [(3,), (2, 5), (1, 1), (0, 4), (2, 16, 3), (3, 1, 2), (2, 3, 2, 2), (2, 0, 3)]
                            if len(s) >= least])


def run(backend, op, inputs, cotangent, **options):
    """What op returns, and the gradient of each of its inputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    with use_backend(backend):
        outputs = op(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, inputs, [cotangent(t) for t in outputs])
    return [*outputs, *gradients]


def agree(op, inputs, cotangent, tolerance, **options):
    actual, expected = (run(backend, op, inputs, cotangent, **options) for backend in ("torch", "reference"))
    assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@few
@given(BATCHES, st.integers(1, 3), LENGTHS, HEAD_DIMS, PRECISIONS, layouts(ATTENTION_LAYOUTS), layouts(COTANGENTS),
       st.sampled_from([None, 0.3]), st.sampled_from(["no", "number", "rows"]), SEEDS)
def test_causal_attention(batch, heads, length, dim, precision, layout, cotangent, scale, temperature, seed):
    dtype, tolerance = precision
    q, k, v = (layout(t) for t in draw(seed, 3, batch, heads, length, dim, dtype=dtype))
    tau = draw(seed, batch, dtype=dtype).exp()

    def op(q, k, v, tau):
        options = {"no": {}, "number": {"temperature": 1.7}, "rows": {"temperature": tau}}[temperature]
        return causal_attention(q, k, v, scale=scale, **options) + 0 * tau.view(-1, 1, 1, 1)

    agree(op, (q, k, v, tau), cotangent, tolerance)
