"""The rows of a decoding batch: the conditional branch and, under guidance, the reference branch behind it."""

import torch
from torch import Tensor

from tarflow_kernels import affine_inverse, guided_affine_inverse

from ..guidance import Guidance
from ..transformer import CausalTransformer


class Branches:
    """What B samples cost in rows, what each row adds to its tokens, and how the rows make one sample again.

    Attributes:
        rows: B, or 2B under guidance.
        context: class embedding of each row, ``(rows, C)``, or None for a model without classes.
        temperature: of the attention logits, 1.0 or ``(rows,)``.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        batch: int,
        num_tokens: int,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
    ):
        self.batch = batch
        self.guidance = guidance if guidance is not None and guidance.weight else None
        self.rows = batch if self.guidance is None else 2 * batch
        self.temperature: float | Tensor = 1.0
        if self.guidance is not None:
            self.weights = guidance.weights(num_tokens).tolist()
            if labels is not None:
                reference = torch.full_like(labels, -1) if guidance.drop_label else labels
                labels = torch.cat((labels, reference))
            if guidance.temperature != 1:
                taus = transformer.pos_embed.new_tensor([1.0, guidance.temperature])
                self.temperature = taus.repeat_interleave(batch)
        self.context = transformer.embed_classes(labels)

    def split(self, rows: Tensor) -> Tensor:
        """``(rows, ...)`` viewed as ``(branches, B, ...)``."""
        return rows.view(-1, self.batch, *rows.shape[1:])

    def affine_inverse(self, z: Tensor, mu: Tensor, alpha: Tensor, i: int, out: Tensor) -> None:
        """Write ``x = z exp(alpha) + mu`` for the latents z ``(B, D)`` of token i, guided where asked for."""
        if self.guidance is None:
            out.copy_(affine_inverse(z, mu, alpha)[0])
            return
        mu, mu_ref = mu[: self.batch], mu[self.batch :]
        alpha, alpha_ref = alpha[: self.batch], alpha[self.batch :]
        if self.guidance.parameters == "alpha":
            mu_ref = mu
        elif self.guidance.parameters == "mu":
            alpha_ref = alpha
        guided_affine_inverse(z, mu, alpha, mu_ref, alpha_ref, self.weights[i], out=out)
