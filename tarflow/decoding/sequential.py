"""The sequential decoder: token by token, exact, one transformer pass per token for all branches of guidance.

The map of token i has parameters that see x_<i only. So N - 1 passes over one token each, against a key-value cache,
invert it. Under guidance the conditional and the reference branch are the two halves of one batch of 2B rows, which
reads each weight once. Per pass of a block with L layers of width C over R rows the floor is 12 L C^2 weights and, at
position n, 2 L R n C elements of cache, each read once.
"""

import torch
from torch import Tensor

from tarflow_kernels import embed_next

from ..coupling import Mixture
from ..guidance import Guidance
from ..transformer import CausalTransformer
from .branches import Branches
from .graphs import Replayed
from .step import Step, at, put


def sequential(
    transformer: CausalTransformer, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None
) -> tuple[Tensor, int]:
    """Latents ``(B, N, D)`` to tokens ``(B, N, D)``, both in the order in which the block generates; and the passes."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x, steps = z.clone(), z.shape[1] - 1
    branches = Branches(transformer, z, labels, guidance)
    step = Step(transformer, branches, z.dtype)
    h = step.embed(branches.repeat(x[:, :1]))

    def advance() -> None:
        """An affine map, its guidance and the embedding of what it makes are one operator."""
        mu, alpha = step.transform(h)
        given, refs = branches.pair((mu[:, 0], alpha[:, 0]))
        places = step.positions[: len(x)]
        h[:, 0] = embed_next(x, z, *given, *refs, branches.weights, places, step.proj_in, step.embedding, step.context)
        step.positions.add_(1)

    def advance_mixture() -> None:
        """A mixture's are one after the other."""
        parameters = step.transform(h)
        step.positions.add_(1)
        places = step.positions[: len(x), None].long()
        token = transformer.coupling.inverse(at(places, z), *branches.guide(parameters, places))
        put(places, x, token)
        h.copy_(step.embed(branches.repeat(token)))

    step_on = advance_mixture if isinstance(transformer.coupling, Mixture) else advance
    replayed = Replayed(z.device)
    # The step has cast its weights itself.
    with torch.autocast(z.device.type, enabled=False):
        for _ in range(steps):
            replayed(step_on)
    return x, steps
