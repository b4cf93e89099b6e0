"""The tail of a decoding step in one launch: guidance, affine map, the write to x, the embedding, the next position.

A program owns a sample and a block of channels. Every program of a sample computes the same token, which is cheaper
than handing it from one launch to the next, and the first of them writes it. All rows of the sample's branches share
the token's projection, and differ in their context alone. Where a sample stands is read on the device, so that one CUDA
graph serves every step.

*Who moves the position.* All programs of a sample read it, in any order, so that only the one that is last may move it.
Each, having read, takes a ticket: an atomic addition, in front of which a barrier holds back all its threads, and which
is ordered behind their reads and ahead of the write. Whoever draws the last ticket moves the position and returns the
tickets to zero, for the next launch. Nobody waits, and no result depends on who it was.

Bytes to move: the projection once, the rows of context and of the result once, and little else.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class View(NamedTuple):
    """A tensor and its strides, as a kernel takes them."""

    pointer: Tensor
    strides: tuple[int, ...]


@triton.jit
def _embed_next_kernel(
    X,
    Z,
    Mu,
    Alpha,
    MuRef,
    AlphaRef,
    Weights,
    Positions,
    Projection,
    Embedding,
    Context,
    H,
    Tickets,
    tokens,
    TOKEN_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BRANCHES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = X.pointer.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    rows = (sample + tl.arange(0, BRANCHES) * tl.num_programs(0).to(tl.int64))[:, None]
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_token, in_row = dims < TOKEN_DIM, channels < CHANNELS

    # What does not depend on the position is asked for first, and nothing is stored before all is loaded: a compiler
    # cannot know that it may read on.
    tile = _offsets(Projection, dims[:, None], channels[None, :])
    projection = tl.load(Projection.pointer + tile, mask=in_token[:, None] & in_row[None, :], other=0.0)
    h = tl.zeros([BRANCHES, BLOCK_C], ACC)
    if Context is not None:
        h += tl.load(Context.pointer + _offsets(Context, rows, channels[None, :]), mask=in_row[None, :], other=0.0)
    mu = _parameter(Mu, sample, dims, in_token, ACC)
    a = _parameter(Alpha, sample, dims, in_token, ACC)

    following = tl.load(Positions.pointer + sample * Positions.strides[0]).to(tl.int64) + 1
    inside = (following >= 0) & (following < tokens)  # wherever it stands, no memory beside the tensors is touched
    i = tl.where(inside, following, 0)
    z = tl.load(Z.pointer + _offsets(Z, sample, i) + dims * Z.strides[2], mask=in_token, other=0.0)
    h += tl.load(Embedding.pointer + _offsets(Embedding, i, channels), mask=in_row, other=0.0)[None, :]
    if Weights is not None:
        w = tl.load(Weights.pointer + i * Weights.strides[0]).to(ACC)
        mu += w * (mu - _parameter(MuRef, sample, dims, in_token, ACC))
        a += w * (a - _parameter(AlphaRef, sample, dims, in_token, ACC))
    token = z * tl.exp(a) + mu
    h += tl.sum(token[:, None] * projection, 0)[None, :]

    # All that is read has been read; what is written after this need not be waited for.
    tl.debug_barrier()
    ticket = tl.atomic_add(Tickets.pointer + sample * Tickets.strides[0], 1, sem="acq_rel")
    last = ticket == tl.num_programs(1) - 1

    tl.store(H.pointer + _offsets(H, rows, channels[None, :]), h, mask=in_row[None, :])
    written = in_token & inside & (tl.program_id(1) == 0)
    tl.store(X.pointer + _offsets(X, sample, i) + dims * X.strides[2], token, mask=written)
    tl.store(Positions.pointer + rows * Positions.strides[0], following.to(tl.int32), mask=last)
    tl.store(Tickets.pointer + sample * Tickets.strides[0], 0, mask=last)


@triton.jit
def _parameter(view, sample, dims, mask, ACC: tl.constexpr):
    return tl.load(view.pointer + _offsets(view, sample, dims), mask=mask, other=0.0).to(ACC)


@triton.jit
def _offsets(view, first, second):
    """The offsets of elements by their indices in the first two dimensions, in int64 as those are."""
    return first * view.strides[0] + second * view.strides[1]


def embed_next(
    x: Tensor,
    z: Tensor,
    mu: Tensor,
    alpha: Tensor,
    mu_ref: Tensor | None,
    alpha_ref: Tensor | None,
    weights: Tensor | None,
    positions: Tensor,
    projection: Tensor,
    embedding: Tensor,
    context: Tensor | None,
    h: Tensor,
    tickets: Tensor,
) -> None:
    """Write the next token of every sample into x and the rows of all branches into h, and move the positions."""
    if not h.numel():
        return
    (samples, tokens, token_dim), channels = x.shape, h.shape[1]
    block_d = triton.next_power_of_2(token_dim)
    # A tile of the projection takes at most 64 registers of each thread, which is 32 KB.
    block_c = min(32768 // (x.element_size() * block_d), 128, triton.next_power_of_2(channels))
    tables = projection, embedding, context
    tensors = x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, *tables, h, tickets
    _embed_next_kernel[(samples, triton.cdiv(channels, block_c))](
        *(None if tensor is None else View(tensor, tensor.stride()) for tensor in tensors),
        tokens,
        TOKEN_DIM=token_dim,
        CHANNELS=channels,
        BRANCHES=1 if weights is None else 2,
        BLOCK_D=block_d,
        BLOCK_C=block_c,
        num_warps=4,
    )
