"""Guidance: moving the parameters of each token's map away from those of a less informed reference branch."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Guidance", "divide_densities", "extrapolate", "extrapolate_scale"]

# Far beyond any use: published weights are below 10, temperatures between 0.1 and 2.
MAX_WEIGHT = 100
MAX_TEMPERATURE = 1000


@dataclass(frozen=True)
class Guidance:
    """``v <- (1 + w_i) v(cond) - w_i v(ref)`` for token i of N and each guided v of alpha and mu.

    That is the rule ``"extrapolate"``. In a mixture transform v is every parameter of the map: the logits, means and
    log-scales of the components too, any real values of which make a map. Of a model that takes noise levels v is
    ``sigma = exp(alpha)`` in place of alpha, :func:`extrapolate_scale`. By the rule ``"gaussian"`` a token is drawn
    from the normalized ``p(cond)^(1 + w_i) / p(ref)^w_i`` of two Gaussians, :func:`divide_densities`.

    The reference branch is the same transformer with less information: without its label (label guidance), with its
    attention logits divided by ``temperature`` (temperature guidance, which needs no labels), or both. Sources: TarFlow
    (arXiv 2412.06329); sigma and the number of blocks iTarFlow (arXiv 2604.20041); the densities STARFlow (arXiv
    2506.06276).

    Args:
        weight: w, at most 100; 0 is no guidance.
        schedule: ``"linear"`` is ``w_i = w * i / (N - 1)``, ``"constant"`` is ``w_i = w``.
        temperature: tau of the reference branch, from 0.001 to 1000; 1 leaves its attention as it is.
        parameters: which of the affine parameters are guided; both in a mixture transform.
        drop_label: whether the reference branch drops the label. A model without classes has none to drop.
        rule: ``"extrapolate"`` or ``"gaussian"``, which guides both parameters, and no mixtures.
        blocks: how many of the blocks that are generated first are guided; None is all.

    Raises:
        ValueError: a weight or a temperature that is no number or out of range, an unknown name.
    """

    weight: float = 2.0
    schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0
    parameters: Literal["both", "alpha", "mu"] = "both"
    drop_label: bool = True
    rule: Literal["extrapolate", "gaussian"] = "extrapolate"
    blocks: int | None = None

    def __post_init__(self):
        if not isinstance(self.weight, Real) or not 0 <= self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight: expected a number from 0 to {MAX_WEIGHT}; got {self.weight}")
        if not isinstance(self.temperature, Real) or not 1 / MAX_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature: expected a number from {1 / MAX_TEMPERATURE:g} to {MAX_TEMPERATURE}; "
                f"got {self.temperature}"
            )
        if not isinstance(self.drop_label, bool):
            raise ValueError(f"drop_label: expected True or False; got {self.drop_label!r}")
        for name, value, known in (
            ("schedule", self.schedule, ("linear", "constant")),
            ("parameters", self.parameters, ("both", "alpha", "mu")),
            ("rule", self.rule, ("extrapolate", "gaussian")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
        if self.rule == "gaussian" and self.parameters != "both":
            raise ValueError(f"parameters: expected both with the rule gaussian; got {self.parameters!r}")
        if self.blocks is not None and (type(self.blocks) is not int or self.blocks < 1):
            raise ValueError(f"blocks: expected an integer >= 1, or None for all; got {self.blocks!r}")

    def weights(self, num_tokens: int) -> Tensor:
        """Return w_i for every token, ``(N,)``, in float64: a model of any precision may use them.

        >>> Guidance(weight=3.0, schedule="linear").weights(4)
        tensor([0., 1., 2., 3.], dtype=torch.float64)
        """
        if self.schedule == "constant":
            return torch.full((num_tokens,), self.weight, dtype=torch.float64)
        return torch.arange(num_tokens, dtype=torch.float64) * (self.weight / max(num_tokens - 1, 1))

    def of_block(self, number: int) -> "Guidance | None":
        """Return the guidance of the block that is generated after so many others, None where there is none."""
        return self if self.blocks is None or number < self.blocks else None

    @classmethod
    def of(cls, guidance: "Guidance | None") -> "Guidance | None":
        """Return guidance or None unchanged; raise TypeError for anything else, such as a bare weight."""
        if guidance is not None and not isinstance(guidance, cls):
            raise TypeError(f"guidance: expected a tarflow.Guidance or None; got {guidance!r}")
        return guidance

    def check(self, num_classes: int, mixture: bool = False) -> None:
        """Raise ValueError where both branches of a model would be the same, or a mixture be guided as none can be."""
        if mixture and self.parameters != "both":
            raise ValueError(f"parameters: expected both with a mixture coupling; got {self.parameters!r}")
        if mixture and self.rule != "extrapolate":
            raise ValueError(f"rule: expected extrapolate with a mixture coupling; got {self.rule!r}")
        if self.weight and self.temperature == 1 and not (self.drop_label and num_classes):
            raise ValueError(
                "guidance: the reference branch equals the conditional one; expected a model with classes whose label "
                f"is dropped, or a temperature other than 1; got num_classes={num_classes}, "
                f"drop_label={self.drop_label}, temperature={self.temperature}"
            )


Parameters = Sequence[Tensor]


def extrapolate(conditional: Parameters, reference: Parameters, weights: Tensor) -> tuple[Tensor, ...]:
    """Return ``v + w (v - v_ref)`` of each parameter, ``(B, ..., D, ...)``, for weights w ``(B, ...)``."""
    pairs, w = zip(conditional, reference, strict=True), -weights
    return tuple(torch.lerp(v, ref, _spread(w, v)) for v, ref in pairs)


def extrapolate_scale(conditional: Parameters, reference: Parameters, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the guided mu and alpha, where ``sigma = exp(alpha)`` is moved: ``|sigma + w (sigma - sigma_ref)|``.

    A negative sigma draws from the same distribution as its absolute value, which has a logarithm.
    """
    (mu, alpha), (mu_ref, alpha_ref) = conditional, reference
    w = _spread(weights, mu)
    ratio = 1 - w * torch.expm1(alpha_ref - alpha)
    return torch.lerp(mu, mu_ref, -w), alpha + ratio.abs().log()


def divide_densities(conditional: Parameters, reference: Parameters, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return mu and alpha of the Gaussian ``p^(1 + w) / p_ref^w``.

    With ``s = min(sigma / sigma_ref, 1)^2`` and ``n = 1 + w - w s``, where the minimum has the quotient normalizable,
    ``sigma <- sigma / sqrt(n)`` and ``mu <- ((1 + w) mu - w s mu_ref) / n``.
    """
    (mu, alpha), (mu_ref, alpha_ref) = conditional, reference
    w, log_s = _spread(weights, mu), 2 * (alpha - alpha_ref).clamp(max=0)
    excess = -w * torch.expm1(log_s)  # n - 1
    return mu + w * log_s.exp() * (mu - mu_ref) / (1 + excess), alpha - 0.5 * torch.log1p(excess)


def _spread(weights: Tensor, parameter: Tensor) -> Tensor:
    return weights.view(*weights.shape, *[1] * (parameter.dim() - weights.dim()))
