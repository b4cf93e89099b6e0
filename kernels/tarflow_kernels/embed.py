"""The link between two passes of a decoding step: the token that follows, and its embedding for every branch.

Source: TarFlow (arXiv 2412.06329), whose guidance runs a conditional and a reference branch.
"""

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
) -> Tensor:
    """Decode the token behind ``positions``, write it into x, and embed it for all branches.

    For sample b, with ``i = positions[b] + 1``, and each row r of its branches,

        x_i = z_i exp(a) + m        h_r = x_i projection + embedding_i + context_r

    where ``v = (1 + w_i) v(cond) - w_i v(ref)`` for v in {a, m} under guidance, and ``a = alpha``, ``m = mu`` without.

    Args:
        x: tokens ``(B, N, D)``, float32 or float64, any strides; ``x[b, i]`` is updated in place.
        z: latents, of the shape and dtype of x, any strides, in memory of their own.
        mu, alpha: ``(B, D)``, parameters of token i, any strides, best with a contiguous last dimension, possibly of a
            lower precision; those of the conditional branch under guidance.
        mu_ref, alpha_ref: those of the reference branch, which guidance moves away from; None without guidance.
        weights: w, one for each token, ``(N,)``; None without guidance.
        positions: int32 ``(B,)`` on the device of x; samples may stand at different positions. That they lie
            between 0 and N - 2 is the caller's promise, which nobody checks. Where it is broken, PyTorch's indexing may
            raise; the Triton kernel returns rows that mean nothing, and leaves x as it is.
        projection: ``(D, C)``, of the dtype of x, as all that follow.
        embedding: ``(N, C)``, a row for each position.
        context: ``(R, C)``, what is added to each row of the result, or None.

    Returns:
        ``(R, C)``, contiguous, in the dtype of x: R = B rows, or R = 2B under guidance, the rows of the conditional
        branch first and those of the reference branch behind. Not differentiable.

    Raises:
        TypeError: dtypes other than these.
        ValueError: shapes or devices that do not fit each other; some, not all, of ``mu_ref``, ``alpha_ref`` and
            ``weights`` given.

    >>> x, z, at = torch.zeros(1, 3, 2), torch.ones(1, 3, 2), torch.tensor([1], dtype=torch.int32)
    >>> mu, alpha, projection, embedding = torch.tensor([[0.0, 4.0]]), torch.zeros(1, 2), torch.eye(2), torch.ones(3, 2)
    >>> embed_next(x, z, mu, alpha, None, None, None, at, projection, embedding, None)
    tensor([[2., 6.]])
    >>> x
    tensor([[[0., 0.],
             [0., 0.],
             [1., 5.]]])
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
    channels, token = projected[1], (samples, token_dim)
    check_tensors(
        "x",
        x,
        ("z", z, shape, dtype),
        ("mu", mu, token, None),
        ("alpha", alpha, token, None),
        ("mu_ref", mu_ref, token, None),
        ("alpha_ref", alpha_ref, token, None),
        ("weights", weights, (tokens,), None),
        ("positions", positions, (samples,), torch.int32),
        ("projection", projection, (token_dim, channels), dtype),
        ("embedding", embedding, (tokens, channels), dtype),
        ("context", context, (samples if weights is None else 2 * samples, channels), dtype),
    )
    return dispatch.call(
        "embed_next", x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context
    )


def _reference(x, z, mu, alpha, mu_ref, alpha_ref, weights, *rest):
    parameters = (None if t is None else t.to(x.dtype) for t in (mu, alpha, mu_ref, alpha_ref, weights))
    return reference.embed_next(x, z, *parameters, *rest).contiguous()


def _torch(x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context):
    known = set(positions.tolist()) if x.is_cpu else set()
    if len(known) == 1:
        # On a CPU all samples mostly stand at one position, and slices are far cheaper than indices.
        i, samples = known.pop() + 1, slice(None)
        w = None if weights is None else -weights[i].item()
    else:
        i, samples = positions.long() + 1, torch.arange(len(x), device=x.device)
        w = None if weights is None else -weights[i, None].to(x.dtype)
    mu, alpha = mu.to(x.dtype), alpha.to(x.dtype)
    if w is not None:
        mu, alpha = torch.lerp(mu, mu_ref.to(x.dtype), w), torch.lerp(alpha, alpha_ref.to(x.dtype), w)
    token = torch.addcmul(mu, z[samples, i], alpha.exp())
    x[samples, i] = token
    # Autocast leaves a product alone that has a tensor to go to: this one stays in full precision.
    h = torch.addmm(embedding[i], token, projection, out=x.new_empty(len(x), projection.shape[1]))
    branches = 1 if w is None else 2
    if context is None:
        return h.repeat(branches, 1)
    return (context.view(branches, *h.shape) + h).flatten(0, 1).contiguous()  # contexts may lie in any order


def _fake(x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context):
    return x.new_empty(len(x) if weights is None else 2 * len(x), projection.shape[1])


def _serves(x: Tensor, *_) -> bool:
    """Whether a token fits into the registers of one program."""
    return x.shape[2] <= 256


dispatch.register(
    "embed_next(Tensor(a!) x, Tensor z, Tensor mu, Tensor alpha, Tensor? mu_ref, Tensor? alpha_ref, Tensor? weights,"
    " Tensor positions, Tensor projection, Tensor embedding, Tensor? context) -> Tensor",
    fake=_fake,
    serves=_serves,
    reference=_reference,
    torch=_torch,
    triton=dispatch.launcher("embed", "embed_next"),
)
