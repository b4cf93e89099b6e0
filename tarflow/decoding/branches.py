"""The rows of a decoding batch: the conditional branch and, under guidance, the reference branch behind it."""

import torch
from torch import Tensor

from ..coupling import Parameters
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

    def guide(self, parameters: Parameters, places: Tensor) -> Parameters:
        """Parameters ``(rows, G, ...)`` of all branches to those of the samples' tokens at ``places`` ``(B, G)``."""
        if self.weights is None:
            return parameters
        w = -self.weights[places]
        pairs = zip(*self.pair(parameters), strict=True)
        return tuple(torch.lerp(v, ref, w.view(*w.shape, *[1] * (v.dim() - 2))) for v, ref in pairs)

    def pair(self, parameters: Parameters) -> tuple[Parameters, Parameters | tuple[None, ...]]:
        """The parameters of all rows as those of the conditional and of the reference branch, None without one.

        Where one of mu and alpha is not guided, its reference is itself.
        """
        if self.guidance is None:
            return parameters, (None,) * len(parameters)
        conditional, reference = zip(*(v.chunk(2) for v in parameters), strict=True)
        if self.guidance.parameters == "alpha":
            reference = conditional[0], *reference[1:]
        elif self.guidance.parameters == "mu":
            reference = reference[0], *conditional[1:]
        return conditional, reference
