"""The rows of a decoding batch: the conditional branch and, under guidance, the reference branch behind it."""

import torch
from torch import Tensor

from ..guidance import Guidance
from ..transformer import CausalTransformer


def count_branches(guidance: Guidance | None) -> int:
    """Two under guidance that has any weight, else one."""
    return 2 if guidance is not None and guidance.weight else 1


class Branches:
    """What B samples cost in rows, what each row adds to its tokens, and how the rows make one sample again.

    Attributes:
        count: of branches: 2 under guidance, else 1.
        rows: B, or 2B under guidance.
        context: class embedding of each row, ``(rows, C)``, or None for a model without classes.
        temperature: of the attention logits, 1.0 or ``(rows,)``.
        weights: w_i of guidance for every token, ``(N,)``, or None without guidance.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        z: Tensor,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
    ):
        batch, num_tokens, _ = z.shape
        self.count = count_branches(guidance)
        self.guidance = guidance if self.count == 2 else None
        self.rows = self.count * batch
        self.temperature: float | Tensor = 1.0
        self.weights: Tensor | None = None
        if self.guidance is not None:
            self.weights = guidance.weights(num_tokens).to(z)
            if labels is not None:
                reference = torch.full_like(labels, -1) if guidance.drop_label else labels
                labels = torch.cat((labels, reference))
            if guidance.temperature != 1:
                taus = transformer.pos_embed.new_tensor([1.0, guidance.temperature])
                self.temperature = taus.repeat_interleave(batch)
        self.context = transformer.embed_classes(labels)

    def repeat(self, samples: Tensor) -> Tensor:
        """``(B, ...)`` for every branch, ``(rows, ...)``."""
        return samples if self.guidance is None else torch.cat((samples, samples))

    def rows_of(self, samples: Tensor, batch: int) -> Tensor:
        """The rows of samples, given by their indices in a batch of that size."""
        return samples if self.guidance is None else torch.cat((samples, samples + batch))

    def guide(self, mu: Tensor, alpha: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters ``(rows, G, D)`` of all branches to those of the samples' tokens at ``places`` ``(B, G)``."""
        if self.weights is None:
            return mu, alpha
        mu, alpha, mu_ref, alpha_ref = self.pair(mu, alpha)
        w = -self.weights[places][..., None]
        return torch.lerp(mu, mu_ref, w), torch.lerp(alpha, alpha_ref, w)

    def pair(self, mu: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The parameters of all rows as mu and alpha of the conditional and of the reference branch, if there is one.

        Where one of them is not guided, its reference is itself.
        """
        if self.guidance is None:
            return mu, alpha, None, None
        (mu, mu_ref), (alpha, alpha_ref) = mu.chunk(2), alpha.chunk(2)
        if self.guidance.parameters == "alpha":
            mu_ref = mu
        elif self.guidance.parameters == "mu":
            alpha_ref = alpha
        return mu, alpha, mu_ref, alpha_ref
