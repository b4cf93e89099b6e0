"""Every op as a pure function of tensors, and shapes that it takes: what tests of all ops go over."""

import math
from functools import partial

import pytest
import torch

from helpers import draw
from tarflow_kernels import (
    affine_forward,
    affine_inverse,
    causal_attention,
    decode_attention,
    embed_next,
    mixture_logistic,
    mixture_logistic_inverse,
    residual_norm,
)


def decode(q, k, v, cache_k, cache_v, tau):
    """:func:`decode_attention` as a pure function: its output, and the caches after it."""
    caches = cache_k.clone(), cache_v.clone()
    positions = torch.tensor([0, 3][: len(q)], dtype=torch.int32)
    return decode_attention(q, k, v, *caches, positions, temperature=tau.exp()), *caches


def attend(q, k, v, tau):
    return causal_attention(q, k, v, temperature=tau.exp())


def normalize(h, delta, weight, bias):
    """:func:`residual_norm` as a pure function: with something to add and without, and h after it."""
    h = h.clone()
    return residual_norm(h, delta, weight, bias), residual_norm(h, None, weight, bias, dtype=torch.float32), h


def embed(x, z, mu, alpha, projection, embedding, context=None, mu_ref=None, alpha_ref=None, weights=None):
    """:func:`embed_next` as a pure function: all that it changes."""
    samples, branches = len(x), 1 if weights is None else 2
    x, h, tickets = x.clone(), x.new_empty(branches * samples, projection.shape[1]), torch.zeros(samples).int()
    at = torch.tensor([*range(samples)] * branches, dtype=torch.int32)
    embed_next(x, z, mu, alpha, mu_ref, alpha_ref, weights, at, projection, embedding, context, h, tickets)
    return x, h, at, tickets


ATTENTION, CACHES, TOKENS = (2, 3, 5, 4), (2, 3, 9, 4), (2, 3, 4)
MIXTURE = [(2, 3), *[(2, 3, 5)] * 3]
EMBED = [(2, 3, 6), (2, 3, 6), (2, 6), (2, 6), (6, 5), (3, 5)]

# Every public function, and the shapes of the tensors it takes; those that change their arguments have no gradients.
DIFFERENTIABLE = {
    "causal_attention": (attend, [ATTENTION, ATTENTION, ATTENTION, (2,)]),
    "affine_forward": (affine_forward, [TOKENS] * 3),
    "affine_forward, shift": (partial(affine_forward, shift=True), [TOKENS] * 3),
    "affine_inverse": (affine_inverse, [TOKENS] * 3),
    "affine_inverse, shift": (partial(affine_inverse, shift=True), [TOKENS] * 3),
    "mixture_logistic": (mixture_logistic, MIXTURE),
    "mixture_logistic, no floor": (partial(mixture_logistic, min_log_scale=-math.inf), MIXTURE),
    "mixture_logistic_inverse": (partial(mixture_logistic_inverse, min_log_scale=-0.1), MIXTURE),
}
IN_PLACE = {
    "decode_attention": (decode, [ATTENTION, ATTENTION, ATTENTION, CACHES, CACHES, (2,)]),
    "residual_norm": (normalize, [TOKENS, TOKENS, (4,), (4,)]),
    "embed_next": (embed, EMBED),
    "embed_next, guided": (embed, [*EMBED, (4, 5), (2, 6), (2, 6), (3,)]),
}
OPS = DIFFERENTIABLE | IN_PLACE
every_op = pytest.mark.parametrize(("op", "shapes"), OPS.values(), ids=OPS)


def inputs_of(shapes, requires_grad=True, dtype=torch.float64):
    """Leaves of these shapes."""
    draws = (draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))
    return [t.mul(0.5).requires_grad_(requires_grad) for t in draws]
