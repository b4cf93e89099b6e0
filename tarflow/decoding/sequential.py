"""The sequential decoder: token by token, exact, one transformer pass per token for all branches of guidance.

A block maps token i by ``x_i = z_i exp(alpha_i) + mu_i``, where (alpha_i, mu_i) see x_<i only. So N - 1 passes over one
token each, against a key-value cache, invert it. Under guidance the conditional and the reference branch are the two
halves of one batch of 2B rows, which reads each weight once. Per pass of a block with L layers of width C over R rows
the floor is 12 L C^2 weights and, at position n, 2 L R n C elements of cache, each read once.
"""

import torch
from torch import Tensor

from ..guidance import Guidance
from ..transformer import CausalTransformer
from .branches import Branches
from .graphs import Replayed
from .step import Step, without_onednn


def sequential(
    transformer: CausalTransformer, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None
) -> tuple[Tensor, int]:
    """Latents ``(B, N, D)`` to tokens ``(B, N, D)``, both in the order in which the block generates; and the passes."""
    x = z.to(torch.promote_types(z.dtype, torch.float32), copy=True)
    branches = Branches(transformer, x, labels, guidance)
    step = Step(transformer, branches.rows, branches.context, branches.temperature)
    tokens = branches.repeat(x[:, :1]).clone(memory_format=torch.contiguous_format)
    steps = z.shape[1] - 1
    following = torch.ones(1, dtype=torch.int64, device=z.device)

    def advance() -> None:
        mu, alpha = step(tokens)
        weights = None if branches.weights is None else branches.weights.index_select(0, following)
        token = branches.affine_inverse(z.index_select(1, following), mu, alpha, weights)
        x.index_copy_(1, following, token)
        tokens.view(branches.count, *token.shape).copy_(token)
        step.positions.add_(1)
        following.add_(1)

    replayed = Replayed(advance, z.device)
    # The step has cast its weights itself.
    with torch.autocast(z.device.type, enabled=False), without_onednn(step.hidden):
        for _ in range(steps):
            replayed()
    return x, steps
