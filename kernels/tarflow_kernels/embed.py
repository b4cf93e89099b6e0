"""The link between two passes of a decoding step: the token that follows, and its embedding for every branch.

Source: TarFlow (arXiv 2412.06329), whose guidance runs a conditional and a reference branch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .arguments import check_tensors

__all__ = ["embed_next"]


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
    """Decode the token behind ``positions`` into x, embed it for all branches into h, and move the positions there.

    For sample b, with ``i = positions[b] + 1``, and each row r of its branches,

        x_i = z_i exp(a) + m        h_r = x_i projection + embedding_i + context_r        positions_r = i

    where ``v = (1 + w_i) v(cond) - w_i v(ref)`` for v in {a, m} under guidance, and ``a = alpha``, ``m = mu`` without.
    There are R = B rows, or R = 2B under guidance: those of the conditional branch, and behind them those of the
    reference branch. Nothing is returned, and nothing is differentiable.

    Args:
        x: tokens ``(B, N, D)``, float32 or float64, any strides; ``x[b, i]`` is updated in place.
        z: latents, of the shape and dtype of x, any strides, in memory of their own.
        mu, alpha: ``(B, D)``, parameters of token i, any strides, best with a contiguous last dimension, possibly of a
            lower precision; those of the conditional branch under guidance.
        mu_ref, alpha_ref: those of the reference branch, which guidance moves away from; None without guidance.
        weights: w, one for each token, ``(N,)``; None without guidance.
        positions: int32 ``(R,)`` on the device of x, one more afterwards. Samples may stand at different positions, the
            rows of a sample stand at one. That they lie between 0 and N - 2 is the caller's promise, which nobody
            checks. Where it is broken, PyTorch's indexing may raise; the Triton kernel writes rows of h that mean
            nothing, leaves x as it is, and touches no memory beside the tensors.
        projection: ``(D, C)``, of the dtype of x, as all that follow but the tickets.
        embedding: ``(N, C)``, a row for each position.
        context: ``(R, C)``, what is added to each row of h, or None.
        h: ``(R, C)``, any strides, overwritten.
        tickets: int32 ``(B,)``, zeros before and afterwards, which no other launch uses meanwhile. Several programs of
            the Triton kernel read the position of a sample; they count here, so that the last of them moves it.

    Raises:
        TypeError: dtypes other than these.
        ValueError: shapes or devices that do not fit each other; some, not all, of ``mu_ref``, ``alpha_ref`` and
            ``weights`` given.

    >>> x, z, h = torch.zeros(1, 3, 2), torch.ones(1, 3, 2), torch.empty(1, 2)
    >>> mu, alpha, projection, embedding = torch.tensor([[0.0, 4.0]]), torch.zeros(1, 2), torch.eye(2), torch.ones(3, 2)
    >>> at, tickets = torch.tensor([1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    >>> embed_next(x, z, mu, alpha, None, None, None, at, projection, embedding, None, h, tickets)
    >>> x, h, at
    (tensor([[[0., 0.],
             [0., 0.],
             [1., 5.]]]), tensor([[2., 6.]]), tensor([2], dtype=torch.int32))
    """
    shape, dtype = x.shape, x.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise TypeError(f"x: expected float32 or float64; got {dtype}")
    if len(shape) != 3:
        raise ValueError(f"x: expected shape (B, N, D); got {tuple(shape)}")
    (samples, tokens, token_dim), projected = shape, projection.shape
    if len(projected) != 2:
        raise ValueError(f"projection: expected shape ({token_dim}, C); got {tuple(projected)}")
    if not ((mu_ref is None) == (alpha_ref is None) == (weights is None)):
        guidance = {"mu_ref": mu_ref, "alpha_ref": alpha_ref, "weights": weights}
        missing = next(name for name, tensor in guidance.items() if tensor is None)
        raise ValueError(f"{missing}: expected a tensor, or None for each of {', '.join(guidance)}; got None")
    channels, token, rows = projected[1], (samples, token_dim), samples if weights is None else 2 * samples
    check_tensors(
        "x",
        x,
        ("z", z, shape, dtype),
        ("mu", mu, token, None),
        ("alpha", alpha, token, None),
        ("mu_ref", mu_ref, token, None),
        ("alpha_ref", alpha_ref, token, None),
        ("weights", weights, (tokens,), None),
        ("positions", positions, (rows,), torch.int32),
        ("projection", projection, (token_dim, channels), dtype),
        ("embedding", embedding, (tokens, channels), dtype),
        ("context", context, (rows, channels), dtype),
        ("h", h, (rows, channels), dtype),
        ("tickets", tickets, (samples,), torch.int32),
    )
    tables = projection, embedding, context
    dispatch.call("embed_next", x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, *tables, h, tickets)


def _reference(x, z, mu, alpha, mu_ref, alpha_ref, weights, *rest):
    parameters = (None if t is None else t.to(x.dtype) for t in (mu, alpha, mu_ref, alpha_ref, weights))
    reference.embed_next(x, z, *parameters, *rest)


def _torch(x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context, h, tickets):
    known = set(positions.tolist()) if x.is_cpu else set()
    if len(known) == 1:
        # On a CPU all samples mostly stand at one position, and slices are far cheaper than indices.
        i, samples = known.pop() + 1, slice(None)
        w = None if weights is None else -weights[i].item()
    else:
        i, samples = positions[: len(x)].long() + 1, torch.arange(len(x), device=x.device)
        w = None if weights is None else -weights[i, None].to(x.dtype)
    mu, alpha = mu.to(x.dtype), alpha.to(x.dtype)
    if w is not None:
        mu, alpha = torch.lerp(mu, mu_ref.to(x.dtype), w), torch.lerp(alpha, alpha_ref.to(x.dtype), w)
    token = torch.addcmul(mu, z[samples, i], alpha.exp())
    x[samples, i] = token
    first = h[: len(x)]
    # Autocast leaves a product alone that has a tensor to go to: this one stays in full precision.
    torch.addmm(embedding[i], token, projection, out=first)
    if w is not None:
        h[len(x) :] = first
    if context is not None:
        h += context
    positions += 1


def _fake(x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context, h, tickets):
    return None


def _serves(x: Tensor, *_) -> bool:
    """Whether a token fits into the registers of one program."""
    return x.shape[2] <= 256


dispatch.register(
    "embed_next(Tensor(a!) x, Tensor z, Tensor mu, Tensor alpha, Tensor? mu_ref, Tensor? alpha_ref, Tensor? weights,"
    " Tensor(b!) positions, Tensor projection, Tensor embedding, Tensor? context, Tensor(c!) h, Tensor(d!) tickets)"
    " -> ()",
    fake=_fake,
    serves=_serves,
    reference=_reference,
    torch=_torch,
    triton=dispatch.launcher("embed", "embed_next"),
)
