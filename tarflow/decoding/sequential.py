"""The sequential decoder: token by token, exact, one transformer pass per token for all branches of guidance.

The map of token i has parameters that see x_<i only. So N - 1 passes over one token each, against a key-value cache,
invert it. Under guidance the conditional and the reference branch are the two halves of one batch of 2B rows, which
reads each weight once. Per pass of a block with L layers of width C over R rows the floor is 12 L C^2 weights and, at
position n, 2 L R n C elements of cache, each read once.
"""

import torch
from torch import Tensor

from tarflow_kernels import embed_next

from ..guidance import Guidance
from ..transformer import CausalTransformer
from ..transforms import MixtureTransform
from .step import CachedStep, GraphRunner, GuidedBatch, gather_tokens, scatter_tokens

__all__ = ["sequential"]


def sequential(
    transformer: CausalTransformer, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None
) -> tuple[Tensor, int]:
    """Decode latents ``(B, N, D)`` to tokens ``(B, N, D)``, both in generation order; also return the passes."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x, num_steps = z.clone(), z.shape[1] - 1
    batch = GuidedBatch(transformer, z, labels, guidance)
    step = CachedStep(transformer, batch, z.dtype)
    h = step.embed(batch.repeat(x[:, :1]))
    tickets = torch.zeros(len(x), dtype=torch.int32, device=x.device)

    def advance_affine() -> None:
        """Decode the next token; the affine map, its guidance and the embedding of the token are one operator."""
        mu, alpha = step.run_layers(h)
        (mu, alpha), (mu_ref, alpha_ref) = batch.split_branches((mu[:, 0], alpha[:, 0]))
        tables = step.proj_in, step.embedding, step.context
        embed_next(x, z, mu, alpha, mu_ref, alpha_ref, batch.weights, step.positions, *tables, h[:, 0], tickets)

    def advance_mixture() -> None:
        """Decode the next token; guidance, mixture and embedding are one operator after the other."""
        parameters = step.run_layers(h)
        step.positions.add_(1)
        positions = step.positions[: len(x), None].long()
        token = transformer.transform.inverse(gather_tokens(z, positions), *batch.guide(parameters, positions))
        scatter_tokens(x, positions, token)
        h.copy_(step.embed(batch.repeat(token)))

    advance = advance_mixture if isinstance(transformer.transform, MixtureTransform) else advance_affine
    runner = GraphRunner(z.device)
    # The step has cast its weights itself.
    with torch.autocast(z.device.type, enabled=False):
        for _ in range(num_steps):
            runner(advance)
    return x, num_steps
