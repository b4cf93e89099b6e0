"""Guidance: moving the parameters of each token's map away from those of a less informed reference branch."""

from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Guidance"]

# Far beyond any use: published weights are below 10, temperatures between 0.1 and 2.
MAX_WEIGHT = 100
MAX_TEMPERATURE = 1000


@dataclass(frozen=True)
class Guidance:
    """``v <- (1 + w_i) v(cond) - w_i v(ref)`` for token i of N and each guided v of alpha and mu.

    In a mixture transform v is every parameter of the map: the logits, means and log-scales of the components too, any
    real values of which make a map.

    The reference branch is the same transformer with less information: without its label (label guidance), with its
    attention logits divided by ``temperature`` (temperature guidance, which needs no labels), or both. Source: TarFlow
    (arXiv 2412.06329).

    Args:
        weight: w, at most 100; 0 is no guidance.
        schedule: ``"linear"`` is ``w_i = w * i / (N - 1)``, ``"constant"`` is ``w_i = w``.
        temperature: tau of the reference branch, from 0.001 to 1000; 1 leaves its attention as it is.
        parameters: which of the affine parameters are guided; both in a mixture transform.
        drop_label: whether the reference branch drops the label. A model without classes has none to drop.

    Raises:
        ValueError: a weight or a temperature that is no number or out of range, an unknown name.
    """

    weight: float = 2.0
    schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0
    parameters: Literal["both", "alpha", "mu"] = "both"
    drop_label: bool = True

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
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")

    def weights(self, num_tokens: int) -> Tensor:
        """Return w_i for every token, ``(N,)``, in float64: a model of any precision may use them.

        >>> Guidance(weight=3.0, schedule="linear").weights(4)
        tensor([0., 1., 2., 3.], dtype=torch.float64)
        """
        if self.schedule == "constant":
            return torch.full((num_tokens,), self.weight, dtype=torch.float64)
        return torch.arange(num_tokens, dtype=torch.float64) * (self.weight / max(num_tokens - 1, 1))

    @classmethod
    def of(cls, guidance: "Guidance | None") -> "Guidance | None":
        """Return guidance or None unchanged; raise TypeError for anything else, such as a bare weight."""
        if guidance is not None and not isinstance(guidance, cls):
            raise TypeError(f"guidance: expected a tarflow.Guidance or None; got {guidance!r}")
        return guidance

    def check(self, num_classes: int, mixture: bool = False) -> None:
        """Raise ValueError where both branches of a model would be the same, or a mixture be guided in part."""
        if mixture and self.parameters != "both":
            raise ValueError(f"parameters: expected both with a mixture coupling; got {self.parameters!r}")
        if self.weight and self.temperature == 1 and not (self.drop_label and num_classes):
            raise ValueError(
                "guidance: the reference branch equals the conditional one; expected a model with classes whose label "
                f"is dropped, or a temperature other than 1; got num_classes={num_classes}, "
                f"drop_label={self.drop_label}, temperature={self.temperature}"
            )
