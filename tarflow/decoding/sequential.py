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
from .step import Step, without_onednn


def sequential(
    transformer: CausalTransformer, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None
) -> Tensor:
    """Latents ``(B, N, D)`` to tokens ``(B, N, D)``, both in the order in which the block generates."""
    batch, num_tokens, token_dim = z.shape
    branches = Branches(transformer, batch, num_tokens, labels, guidance)
    x = z.to(torch.promote_types(z.dtype, torch.float32), copy=True)
    step = Step(transformer, branches.rows, branches.context, branches.temperature)
    tokens = step.embedding.new_empty(branches.rows, token_dim)
    # The step has cast its weights itself.
    with torch.autocast(z.device.type, enabled=False), without_onednn(step.hidden):
        for i in range(num_tokens - 1):
            branches.split(tokens).copy_(x[:, i])
            step.positions.fill_(i)
            mu, alpha = step(tokens)
            branches.affine_inverse(z[:, i + 1], mu, alpha, i + 1, out=x[:, i + 1])
    return x
