"""Causal attention with temperature, forward and backward, in tiles that never leave the chip.

A program of the forward kernel owns a tile of queries and walks over the keys that they see, keeping a running maximum
m and sum l of the softmax (FlashAttention-2, arXiv 2307.08691). With logits ``factor q k^T`` in base 2, where
``factor = scale log2(e) / temperature``, it saves ``lse = m + log2(l)`` for the backward kernels, which recompute the
weights ``p = 2^(factor q k^T - lse)``. With ``delta = sum(out * grad)`` over channels, ``ds = p (grad v^T - delta)``:

    dv = p^T grad,    dq = scale / temperature * ds k,    dk = scale / temperature * ds^T q.

The first backward kernel owns queries and makes delta and dq; the second owns keys and makes dk and dv. One program
writes each output, in one order of summation: results are the same from run to run.

All three have one loop, with the mask under a condition that holds where the diagonal crosses a tile: to end one loop
and begin another costs as much as a tile. Queries and keys are counted within their tiles, since 64-bit numbers compare
at half the speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import empty_backward, empty_forward
from . import configs
from .configs import Config
from .tiles import accumulate, accumulator, base_2, head_of, load_tile, logit_factor, store_tile


@triton.jit
def _causal_attention_forward_kernel(
    Q,
    K,
    V,
    Out,
    Lse,
    Temperature,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    temperature_stride,
    heads,
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    blocks = tl.cdiv(length, BLOCK_M)
    batch, head, block = _place(tl.program_id(0), heads, blocks)
    start_m = (blocks - 1 - block) * BLOCK_M  # late queries see more keys: they start first
    Q = head_of(Q, q_strides, batch, head)
    K = head_of(K, k_strides, batch, head)
    V = head_of(V, v_strides, batch, head)
    Out = head_of(Out, out_strides, batch, head)
    Lse += (batch * heads + head) * length
    ACC: tl.constexpr = accumulator(Q.dtype)
    factor = base_2(logit_factor(Temperature, temperature_stride, batch, scale, ACC))

    q = load_tile(Q, q_strides, start_m, length, BLOCK_M, BLOCK_D, HEAD_DIM, EVEN)
    queries, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start_n in tl.range(0, tl.minimum(start_m + BLOCK_M, length), BLOCK_N):
        k = load_tile(K, k_strides, start_n, length, BLOCK_N, BLOCK_D, HEAD_DIM, EVEN)
        v = load_tile(V, v_strides, start_n, length, BLOCK_N, BLOCK_D, HEAD_DIM, EVEN)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if start_n >= start_m:
            x = tl.where((queries - (start_n - start_m))[:, None] >= keys[None, :], x, float("-inf"))
        acc, m, l = accumulate(acc, m, l, x, v, factor, PRECISION)

    store_tile(Out, out_strides, acc * (1 / l)[:, None], start_m, length, BLOCK_M, BLOCK_D, HEAD_DIM, EVEN)
    tl.store(Lse + start_m + queries, m + tl.log2(l), mask=start_m + queries < length)


@triton.jit
def _causal_attention_backward_queries_kernel(
    Q,
    K,
    V,
    Out,
    Grad,
    Lse,
    Delta,
    Temperature,
    GradQ,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_strides,
    grad_q_strides,
    temperature_stride,
    heads,
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    blocks = tl.cdiv(length, BLOCK_M)
    batch, head, block = _place(tl.program_id(0), heads, blocks)
    start_m = (blocks - 1 - block) * BLOCK_M
    Q = head_of(Q, q_strides, batch, head)
    K = head_of(K, k_strides, batch, head)
    V = head_of(V, v_strides, batch, head)
    Out = head_of(Out, out_strides, batch, head)
    Grad = head_of(Grad, grad_strides, batch, head)
    GradQ = head_of(GradQ, grad_q_strides, batch, head)
    Lse += (batch * heads + head) * length
    Delta += (batch * heads + head) * length
    ACC: tl.constexpr = accumulator(Q.dtype)
    factor = logit_factor(Temperature, temperature_stride, batch, scale, ACC)

    q = load_tile(Q, q_strides, start_m, length, BLOCK_M, BLOCK_D, HEAD_DIM, EVEN)
    grad = load_tile(Grad, grad_strides, start_m, length, BLOCK_M, BLOCK_D, HEAD_DIM, EVEN)
    out = load_tile(Out, out_strides, start_m, length, BLOCK_M, BLOCK_D, HEAD_DIM, EVEN)
    queries, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = start_m + queries < length
    delta = tl.sum(out.to(ACC) * grad.to(ACC), 1)
    tl.store(Delta + start_m + queries, delta, mask=inside)
    lse = tl.load(Lse + start_m + queries, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start_n in tl.range(0, tl.minimum(start_m + BLOCK_M, length), BLOCK_N):
        k = load_tile(K, k_strides, start_n, length, BLOCK_N, BLOCK_D, HEAD_DIM, EVEN)
        v = load_tile(V, v_strides, start_n, length, BLOCK_N, BLOCK_D, HEAD_DIM, EVEN)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        x = x * base_2(factor) - lse[:, None]
        if start_n >= start_m:
            x = tl.where((queries - (start_n - start_m))[:, None] >= keys[None, :], x, float("-inf"))
        ds = tl.exp2(x) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)

    store_tile(GradQ, grad_q_strides, dq * factor, start_m, length, BLOCK_M, BLOCK_D, HEAD_DIM, EVEN)


@triton.jit
def _causal_attention_backward_keys_kernel(
    Q,
    K,
    V,
    Grad,
    Lse,
    Delta,
    Temperature,
    GradK,
    GradV,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    grad_k_strides,
    grad_v_strides,
    temperature_stride,
    heads,
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_N % BLOCK_M == 0)
    # The last heads come first, which the L2 still holds from the kernel before, and in a head early keys, which more
    # queries see.
    blocks = tl.cdiv(length, BLOCK_N)
    batch, head, block = _place(tl.num_programs(0) - 1 - tl.program_id(0), heads, blocks)
    start_n = (blocks - 1 - block) * BLOCK_N
    Q = head_of(Q, q_strides, batch, head)
    K = head_of(K, k_strides, batch, head)
    V = head_of(V, v_strides, batch, head)
    Grad = head_of(Grad, grad_strides, batch, head)
    GradK = head_of(GradK, grad_k_strides, batch, head)
    GradV = head_of(GradV, grad_v_strides, batch, head)
    Lse += (batch * heads + head) * length
    Delta += (batch * heads + head) * length
    ACC: tl.constexpr = accumulator(Q.dtype)
    factor = logit_factor(Temperature, temperature_stride, batch, scale, ACC)

    # Everything is transposed: keys along rows, queries along columns.
    k = load_tile(K, k_strides, start_n, length, BLOCK_N, BLOCK_D, HEAD_DIM, EVEN)
    v = load_tile(V, v_strides, start_n, length, BLOCK_N, BLOCK_D, HEAD_DIM, EVEN)
    queries, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for start_m in tl.range(start_n, length, BLOCK_M):
        q = load_tile(Q, q_strides, start_m, length, BLOCK_M, BLOCK_D, HEAD_DIM, EVEN)
        grad = load_tile(Grad, grad_strides, start_m, length, BLOCK_M, BLOCK_D, HEAD_DIM, EVEN)
        lse, delta = _load_sums(Lse, Delta, start_m + queries, length, EVEN)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION, out_dtype=ACC)
        x = x * base_2(factor) - lse[None, :]
        if start_m < start_n + BLOCK_N:
            x = tl.where((queries + (start_m - start_n))[None, :] >= keys[:, None], x, float("-inf"))
        p = tl.exp2(x)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION, out_dtype=ACC)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)

    store_tile(GradK, grad_k_strides, dk * factor, start_n, length, BLOCK_N, BLOCK_D, HEAD_DIM, EVEN)
    store_tile(GradV, grad_v_strides, dv, start_n, length, BLOCK_N, BLOCK_D, HEAD_DIM, EVEN)


@triton.jit
def _place(index, heads, blocks):
    """The row of the batch, head and tile of a program; the tiles of a head are neighbours, and share its keys."""
    index = index.to(tl.int64)
    return index // blocks // heads, index // blocks % heads, (index % blocks).to(tl.int32)


@triton.jit
def _load_sums(Lse, Delta, queries, length, EVEN: tl.constexpr):
    """Load both sums of queries; those that do not exist have an infinite lse, so that their weights are zero."""
    if EVEN:
        return tl.load(Lse + queries), tl.load(Delta + queries)
    else:
        inside = queries < length
        return tl.load(Lse + queries, mask=inside, other=float("inf")), tl.load(Delta + queries, mask=inside, other=0.0)


def causal_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend: output ``(B, H, N, D)``, laid out as ``(B, N, H, D)``, and the log-sum-exp in base 2, ``(B, H, N)``."""
    out, lse = empty_forward(q, k, v, temperature, scale)
    strides = (q.stride(), k.stride(), v.stride(), out.stride())
    _launch(
        "forward",
        _causal_attention_forward_kernel,
        "BLOCK_M",
        (q, k, v, out, lse, temperature),
        strides,
        temperature,
        scale,
    )
    return out, lse


def causal_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, temperature: Tensor | None, scale: float
) -> Tensor:
    """Compute the gradients of q, k and v in one tensor ``(B, N, 3, H, D)``, as a fused projection lays them out."""
    grads = empty_backward(grad, q, k, v, out, lse, temperature, scale)
    dq, dk, dv = grads.permute(2, 0, 3, 1, 4).unbind()
    delta = torch.empty_like(lse)
    inputs = (q.stride(), k.stride(), v.stride())
    _launch(
        "backward_queries",
        _causal_attention_backward_queries_kernel,
        "BLOCK_M",
        (q, k, v, out, grad, lse, delta, temperature, dq),
        (*inputs, out.stride(), grad.stride(), dq.stride()),
        temperature,
        scale,
    )
    _launch(
        "backward_keys",
        _causal_attention_backward_keys_kernel,
        "BLOCK_N",
        (q, k, v, grad, lse, delta, temperature, dk, dv),
        (*inputs, grad.stride(), dk.stride(), dv.stride()),
        temperature,
        scale,
    )
    return grads


def _launch(phase, kernel, owned, tensors, strides, temperature, scale):
    """Launch a program for every tile of queries, or of keys where the kernel owns these, in every head."""
    q = tensors[0]
    batch, heads, length, head_dim = q.shape
    if not q.numel():
        return
    block_d = configs.block_of(head_dim)
    key = configs.attention_key(q, length)
    config = configs.choose(f"causal_attention_{phase}", key, fallback(phase, q.element_size(), block_d, length))
    kernel[(triton.cdiv(length, config[owned]) * batch * heads,)](
        *tensors,
        *strides,
        0 if temperature is None else temperature.stride(0),
        heads,
        length,
        scale,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        EVEN=length % max(config["BLOCK_M"], config["BLOCK_N"]) == 0,
        PRECISION=configs.dot_precision(q.dtype),
        **config,
    )


def fallback(phase: str, itemsize: int, block_d: int, length: int) -> Config:
    """The configuration where nobody has tuned: the fastest that :mod:`..hopper` predicts and that fits 99 KB on sm_80.

    Some spill a few registers on sm_90, where more programs side by side are predicted to be worth more: those of
    bfloat16 gradients for heads of 64, and of the forward kernel for padded heads of 96.

    >>> fallback("forward", itemsize=2, block_d=64, length=1024)
    {'BLOCK_M': 128, 'BLOCK_N': 32, 'num_warps': 4, 'num_stages': 3, 'maxnreg': 168}
    """
    by_head_dim = _FALLBACKS[phase, min(itemsize, 4)]
    config = next(config for largest, config in by_head_dim.items() if block_d <= largest)
    return config | {"BLOCK_M": min(config["BLOCK_M"], configs.bucket(length))}


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int, maxnreg: int | None = None) -> Config:
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    return config if maxnreg is None else config | {"maxnreg": maxnreg}


# By phase and bytes per element: the configuration up to a head dim. Those of float32 keep three products in registers.
_FALLBACKS = {
    ("forward", 2): {
        32: _config(64, 32, 4, 3),
        64: _config(128, 32, 4, 3, 168),
        128: _config(128, 32, 8, 3, 128),
        256: _config(64, 32, 8, 2),
    },
    ("forward", 4): {32: _config(64, 32, 4, 2), 64: _config(64, 32, 8, 2), 128: _config(16, 16, 4, 1)},
    ("backward_queries", 2): {
        32: _config(64, 32, 4, 3),
        64: _config(128, 64, 8, 3, 128),
        128: _config(64, 32, 4, 2),
        256: _config(32, 16, 8, 1),
    },
    ("backward_queries", 4): {
        16: _config(64, 32, 4, 1),
        32: _config(64, 16, 4, 1),
        64: _config(64, 16, 8, 1),
        128: _config(16, 16, 4, 1),
    },
    ("backward_keys", 2): {
        32: _config(32, 64, 4, 3),
        64: _config(32, 64, 4, 3, 128),
        128: _config(32, 64, 4, 3),
        256: _config(16, 32, 8, 2),
    },
    ("backward_keys", 4): {
        16: _config(32, 64, 4, 1),
        32: _config(16, 64, 4, 1),
        64: _config(32, 32, 8, 1),
        128: _config(16, 16, 4, 1),
    },
}

# What the tuner tries: the larger tile is a multiple of the smaller, and belongs to what the kernel owns. With fewer
# registers for each thread, more programs fit a multiprocessor.
_LIMITS = {4: (None, 168, 128), 8: (None, 128)}
CANDIDATES = {
    "forward": [
        _config(m, n, w, s, r)
        for m in (64, 128)
        for n in (32, 64, 128)
        for w in (4, 8)
        for s in (2, 3)
        for r in _LIMITS[w]
        if n <= m
    ],
    "backward_queries": [
        _config(m, n, w, s, r) for m in (64, 128) for n in (32, 64) for w in (4, 8) for s in (2, 3) for r in _LIMITS[w]
    ],
    "backward_keys": [
        _config(m, n, w, s, r) for n in (64, 128) for m in (32, 64) for w in (4, 8) for s in (2, 3) for r in _LIMITS[w]
    ],
}
