"""Element-wise transforms of a block: the map of each value of a token, given parameters that earlier tokens determine.

Every transform ends in the affine map of TarFlow, ``z = (v - mu) exp(-alpha)``, and transforms differ in what v is of
x, and alpha of the output of the transformer. A transform has no weights: a causal transformer computes its parameters.
It knows

- how many ``outputs`` of the transformer a value takes, and how to ``split`` them into the parameters of the map;
- the bias of the last projection with which an untrained block is about the identity, the weight being zero;
- the map ``forward``, shifted by one token or not, and its ``inverse``, value by value;
- whether a guess of the inverse is good enough, and the inverse: ``refine``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow_kernels import affine_forward, mixture_logistic, mixture_logistic_inverse
from tarflow_kernels.mixture import MAX_COMPONENTS

__all__ = [
    "AffineTransform",
    "MixtureTransform",
    "Parameters",
    "SoftplusTransform",
    "VolumePreservingTransform",
    "make_transform",
]

NAMES = ("affine", "softplus", "mixture")

Parameters = tuple[Tensor, ...]
"""mu and alpha ``(..., D)``, followed by the mixture ``(..., 3, D, K)`` if there is one."""


class AffineTransform:
    """``z = (x - mu) exp(-alpha)``, ``logdet = -sum alpha``: TarFlow's own. Source: arXiv 2412.06329."""

    outputs = 2

    def split(self, out: Tensor) -> Parameters:
        """Split the output of the last projection, ``(..., outputs * D)``, into the parameters."""
        alpha, mu = out.chunk(2, dim=-1)
        return mu, alpha

    def initialize(self, bias: Tensor) -> None:
        """Set the bias of the last projection so that the map is about the identity."""
        bias.zero_()

    def forward(self, x: Tensor, *parameters: Tensor, shift: bool = True) -> tuple[Tensor, Tensor]:
        """Map tokens ``(B, N, D)`` to latents and the log-det in nats, ``(B,)``.

        With ``shift`` token i uses the parameters at position i - 1, and token 0 passes through.
        """
        mu, alpha = parameters
        return affine_forward(x, mu, alpha, shift=shift)

    def inverse(self, z: Tensor, *parameters: Tensor) -> Tensor:
        """Map latents ``(..., D)`` to tokens, given the parameters of each."""
        mu, alpha = parameters
        return torch.addcmul(mu, z, alpha.exp())

    def refine(
        self, x: Tensor, z: Tensor, tolerance: float, rounding: float, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the inverse of z, and whether each value of the guess x agrees with it, both ``(..., D)``.

        A value agrees if its latent differs from z by at most the tolerance: ``|(x - mu) exp(-alpha) - z|``, which is
        the distance of x from the inverse over exp(alpha). A relative difference of ``rounding`` is allowed as well.
        """
        mu, alpha = parameters
        scale = alpha.exp()
        inverse = torch.addcmul(mu, z, scale)
        return inverse, (inverse - x).abs() <= tolerance * scale + rounding * inverse.abs()


class VolumePreservingTransform(AffineTransform):
    """``z = x - mu``: the affine map with ``alpha = 0``, whose log-det is 0."""

    outputs = 1

    def split(self, out: Tensor) -> Parameters:
        """Return the output of the last projection, ``(..., D)``, as mu, and zeros as alpha."""
        return out, torch.zeros_like(out)


class SoftplusTransform(AffineTransform):
    """``z = (x - mu) / sigma`` with ``sigma = softplus(a + log(e - 1))``, 1 at a = 0, and ``alpha = log sigma``.

    Outputs o of the transformer first pass through ``4 tanh(o / 4)``, so that sigma stays within 0.03 and 4.56, and mu
    within 4. Source: STARFlow (arXiv 2506.06276) and its release.
    """

    bound = 4.0
    offset = math.log(math.e - 1)

    def split(self, out: Tensor) -> Parameters:
        """Split the output of the last projection, ``(..., 2 * D)``, into mu and alpha."""
        a, mu = (self.bound * torch.tanh(out / self.bound)).chunk(2, dim=-1)
        return mu, F.softplus(a + self.offset).log()  # a is within the bound: nothing underflows


class MixtureTransform(AffineTransform):
    """``z = (v - mu) exp(-alpha)`` with ``v = logit(sum_k pi_k sigmoid((x - means_k) exp(-log_scales_k)))``.

    The weights ``pi = softmax(logits)`` are over K logistic components. Logits, means and log-scales come as one
    parameter, ``(..., 3, D, K)``. Log-scales below -7, an eighth of the step between two grey levels of 256 in [-1, 1],
    count as -7. Source: Flow++ (arXiv 1902.00275).

    *Untrained.* Were all components alike, with zero weights they would have the same gradients for ever. So their
    means are spread evenly over [-1, 1], where pixels lie, as the midpoints of K intervals; and they have one scale,
    with which the variance of the mixture is that of the standard logistic distribution, whose v is x. The remaining
    difference, ``|v - x|``, is below 0.05 for |x| < 4 and 6 % of |x| beyond, for any K.
    """

    def __init__(self, num_mixtures: int):
        self.num_mixtures = num_mixtures
        self.outputs = 2 + 3 * num_mixtures

    def split(self, out: Tensor) -> Parameters:
        """Split the output of the last projection, ``(..., outputs * D)``, into mu, alpha and the mixture."""
        token_dim = out.shape[-1] // self.outputs
        alpha, mu, mixture = out.tensor_split((token_dim, 2 * token_dim), dim=-1)
        return mu, alpha, mixture.unflatten(-1, (3, token_dim, self.num_mixtures))

    def initialize(self, bias: Tensor) -> None:
        """Set the bias of the last projection so that the map is about the identity."""
        *_, mixture = self.split(bias.zero_())
        _, means, log_scales = mixture.unbind(-3)
        variance = (1 - self.num_mixtures**-2) / 3
        means.copy_((2 * torch.arange(self.num_mixtures) + 1) / self.num_mixtures - 1)
        log_scales.fill_(0.5 * math.log(1 - variance * 3 / math.pi**2))

    def forward(self, x: Tensor, *parameters: Tensor, shift: bool = True) -> tuple[Tensor, Tensor]:
        """Map tokens ``(B, N, D)`` to latents and the log-det, ``(B,)``, shifted as that of AffineTransform."""
        mu, alpha, mixture = parameters
        passed = int(shift)  # tokens without parameters
        v, logdet = mixture_logistic(x[:, passed:], *mixture[:, : mixture.shape[1] - passed].unbind(-3))
        z, affine_logdet = super().forward(torch.cat((x[:, :passed], v), dim=1), mu, alpha, shift=shift)
        return z, logdet + affine_logdet

    def inverse(self, z: Tensor, *parameters: Tensor) -> Tensor:
        """Map latents ``(..., D)`` to tokens, given the parameters of each."""
        mu, alpha, mixture = parameters
        x, _ = mixture_logistic_inverse(super().inverse(z, mu, alpha), *mixture.unbind(-3))
        return x

    def refine(
        self, x: Tensor, z: Tensor, tolerance: float, rounding: float, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the inverse of z, and whether each value of the guess x agrees with it, both ``(..., D)``.

        The slope of a mixture varies, so the latents of x themselves are compared: they differ from z by
        ``|v(x) - v| exp(-alpha)``.
        """
        mu, alpha, mixture = parameters
        scale, components = alpha.exp(), mixture.unbind(-3)
        v = torch.addcmul(mu, z, scale)
        inverse, _ = mixture_logistic_inverse(v, *components)
        latents, _ = mixture_logistic(x, *components)
        near = (latents - v).abs() <= tolerance * scale
        return inverse, near | ((inverse - x).abs() <= rounding * inverse.abs())


def make_transform(name: str, num_mixtures: int, volume_preserving: bool) -> AffineTransform:
    """Make the transform of that name: a mixture has ``num_mixtures`` components, an affine map may preserve volumes.

    Raises:
        ValueError: an unknown name, no or too many components, a mixture that is to preserve volumes.
    """
    if name not in NAMES:
        raise ValueError(f"coupling: expected one of {', '.join(NAMES)}; got {name!r}")
    if name == "affine":
        return VolumePreservingTransform() if volume_preserving else AffineTransform()
    if name == "softplus":
        if volume_preserving:
            raise ValueError("volume_preserving: expected False with the softplus coupling; got True")
        return SoftplusTransform()
    if not 1 <= num_mixtures <= MAX_COMPONENTS:
        raise ValueError(f"num_mixtures: expected 1 to {MAX_COMPONENTS}; got {num_mixtures}")
    if volume_preserving:
        raise ValueError("volume_preserving: expected False with the mixture coupling, which stretches space; got True")
    return MixtureTransform(num_mixtures)
