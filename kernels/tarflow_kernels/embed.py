"""From one pass of a decoding step to the next: the token that follows, and its embedding for every branch.

Source: TarFlow (arXiv 2412.06329), whose guidance runs a conditional and a reference branch.
"""

from typing import NoReturn

import torch
from torch import Tensor

from . import dispatch, reference
from .checks import check_floating, check_positions, check_same_device


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
        embedding: ``(N, C)``, of each position.
        context: of each row, ``(R, C)``, or None.

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
    # One comparison when all is well: this runs once per token.
    shape, dtype, device = x.shape, x.dtype, x.device
    fits = (
        len(shape) == 3
        and z.shape == shape
        and mu.shape == alpha.shape == (shape[0], shape[2])
        and (mu_ref is None) == (alpha_ref is None) == (weights is None)
        and positions.shape == shape[:1]
        and projection.dim() == 2
        and projection.shape[0] == shape[2]
        and embedding.shape == (shape[1], projection.shape[1])
        and (dtype == torch.float32 or dtype == torch.float64)
        and z.dtype == projection.dtype == embedding.dtype == dtype
        and mu.dtype.is_floating_point
        and alpha.dtype.is_floating_point
        and positions.dtype == torch.int32
        and z.device == mu.device == alpha.device == positions.device == projection.device == embedding.device == device
        and (weights is None or _fits_guidance(mu, mu_ref, alpha_ref, weights, embedding))
        and (context is None or _fits_context(context, shape[0] if weights is None else 2 * shape[0], embedding))
    )
    if not fits:
        _explain(x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context)
    return dispatch.call(
        "embed_next", x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context
    )


def _fits_guidance(mu: Tensor, mu_ref: Tensor, alpha_ref: Tensor, weights: Tensor, embedding: Tensor) -> bool:
    return (
        mu_ref.shape == alpha_ref.shape == mu.shape
        and weights.shape == embedding.shape[:1]
        and mu_ref.dtype.is_floating_point
        and alpha_ref.dtype.is_floating_point
        and weights.dtype.is_floating_point
        and mu_ref.device == alpha_ref.device == weights.device == mu.device
    )


def _fits_context(context: Tensor, rows: int, embedding: Tensor) -> bool:
    return (
        context.shape == (rows, embedding.shape[1])
        and context.dtype == embedding.dtype
        and context.device == embedding.device
    )


def _explain(x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context) -> NoReturn:
    """Raise the error of the argument that does not fit."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected float32 or float64; got {x.dtype}")
    if x.dim() != 3:
        raise ValueError(f"x: expected shape (B, N, D); got {tuple(x.shape)}")
    samples, tokens, token_dim = x.shape
    if projection.dim() != 2 or len(projection) != token_dim:
        raise ValueError(f"projection: expected shape ({token_dim}, C); got {tuple(projection.shape)}")
    guidance = {"mu_ref": mu_ref, "alpha_ref": alpha_ref, "weights": weights}
    missing = [name for name, tensor in guidance.items() if tensor is None]
    if missing and len(missing) < len(guidance):
        raise ValueError(f"{missing[0]}: expected a tensor, or None for each of {', '.join(guidance)}; got None")

    channels, rows = projection.shape[1], samples if missing else 2 * samples
    of_the_dtype = {
        "z": (z, x.shape),
        "projection": (projection, (token_dim, channels)),
        "embedding": (embedding, (tokens, channels)),
        "context": (context, (rows, channels)),
    }
    of_any_precision = {
        "mu": (mu, (samples, token_dim)),
        "alpha": (alpha, (samples, token_dim)),
        "mu_ref": (mu_ref, (samples, token_dim)),
        "alpha_ref": (alpha_ref, (samples, token_dim)),
        "weights": (weights, (tokens,)),
    }
    for name, (tensor, shape) in (of_the_dtype | of_any_precision).items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}; got {tuple(tensor.shape)}")
        if name in of_the_dtype and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}; got {tensor.dtype}")
        check_floating(**{name: tensor})
        check_same_device(x=x, **{name: tensor})
    check_positions(positions, samples)
    check_same_device(x=x, positions=positions)


def _reference(x, z, mu, alpha, mu_ref, alpha_ref, weights, *rest):
    parameters = (None if t is None else t.to(x.dtype) for t in (mu, alpha, mu_ref, alpha_ref, weights))
    return reference.embed_next(x, z, *parameters, *rest).contiguous()


def _torch(x, z, mu, alpha, mu_ref, alpha_ref, weights, positions, projection, embedding, context):
    stands = set(positions.tolist()) if x.is_cpu else set()
    if len(stands) == 1:
        # On a CPU all samples mostly stand at one position, and slices are far cheaper than indices.
        i, samples = stands.pop() + 1, slice(None)
        w = None if weights is None else -weights[i].item()
    else:
        i, samples = positions.long() + 1, torch.arange(len(x), device=x.device)
        w = None if weights is None else -weights[i, None].to(x.dtype)
    mu, alpha = mu.to(x.dtype), alpha.to(x.dtype)
    if w is not None:
        mu, alpha = torch.lerp(mu, mu_ref.to(x.dtype), w), torch.lerp(alpha, alpha_ref.to(x.dtype), w)
    token = torch.addcmul(mu, z[samples, i], alpha.exp())
    x[samples, i] = token
    # In full precision: autocast leaves products alone that have a tensor to go to.
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
