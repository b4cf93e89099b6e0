"""A residual and the layer norm behind it in one launch: h is read and written once, and its row stays on the chip.

A program owns a row. What a row costs is the launch and three trips to memory, so there is nothing to tune: a warp for
every 256 channels, which are two loads of 16 bytes for each of its threads in float32.

Bytes to move: h twice, delta and the result once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import accumulator


@triton.jit
def _residual_norm_kernel(
    H,
    Delta,
    Weight,
    Bias,
    Out,
    sizes,
    h_strides,
    delta_strides,
    weight_stride,
    bias_stride,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = accumulator(H.dtype)
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK_C).to(tl.int64)
    exists = channels < CHANNELS
    weight = tl.load(Weight + channels * weight_stride, mask=exists, other=0.0).to(ACC)
    bias = tl.load(Bias + channels * bias_stride, mask=exists, other=0.0).to(ACC)

    pointers = H + _row(sizes, h_strides, row) + channels * h_strides[0]
    h = tl.load(pointers, mask=exists, other=0.0)
    if Delta is not None:
        delta = tl.load(Delta + _row(sizes, delta_strides, row) + channels * delta_strides[0], mask=exists, other=0.0)
        h = (h.to(ACC) + delta.to(ACC)).to(h.dtype)
        tl.store(pointers, h, mask=exists)

    # Statistics are those of what was stored; deviations from the mean are squared as such, not as E[h^2] - E[h]^2.
    x = h.to(ACC)
    centered = tl.where(exists, x - tl.sum(x, 0) / CHANNELS, 0.0)
    variance = tl.sum(centered * centered, 0) / CHANNELS
    y = centered / tl.sqrt(variance + EPS) * weight + bias
    tl.store(Out + row * CHANNELS + channels, y.to(Out.dtype.element_ty), mask=exists)


@triton.jit
def _row(sizes, strides, row):
    """The offset of a row, counted through all dimensions but the last; sizes come innermost first."""
    outermost: tl.constexpr = len(sizes) - 1
    offset = tl.cast(0, tl.int64)
    for k in tl.static_range(outermost):
        offset += row % sizes[k] * strides[k + 1]
        row = row // sizes[k]
    return offset + row * strides[outermost + 1]


def residual_norm(
    h: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The normalized rows, contiguous, in ``dtype``; h is updated in place."""
    out = h.new_empty(h.shape, dtype=dtype)
    if not h.numel():
        return out
    channels = h.shape[-1]
    block = triton.next_power_of_2(channels)
    if h.dim() == 1:
        h, delta = h[None], None if delta is None else delta[None]
    _residual_norm_kernel[(h.numel() // channels,)](
        h,
        delta,
        weight,
        bias,
        out,
        tuple(h.shape[-2::-1]),
        h.stride()[::-1],
        None if delta is None else delta.stride()[::-1],
        weight.stride(0),
        bias.stride(0),
        EPS=eps,
        CHANNELS=channels,
        BLOCK_C=block,
        num_warps=min(max(block // 256, 1), 16),
    )
    return out
