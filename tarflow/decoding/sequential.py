"""The sequential decoder: token by token, exact, one transformer pass per token for all branches of guidance.

The map of token i has parameters that see x_<i only. So N - 1 passes over one token each, against a key-value cache,
invert it. Under guidance the conditional and the reference branch are the two halves of one batch of 2B rows, which
reads each weight once. Per pass of a block with L layers of width C over R rows the floor is 12 L C^2 weights and, at
position n, 2 L R n C elements of cache, each read once.

A pass is a *chain* of kernels, each of which waits for the one before: attention is bound by the memory of the cache,
the products between by latency and weights. Samples are independent. So on a GPU two halves of a large batch may be two
chains on two streams, whose kernels fill each other's gaps: :func:`count_chains`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tarflow_kernels import dispatch

from ..guidance import Guidance
from ..transformer import NO_CONTEXT, CausalTransformer, Context
from ..transforms import MixtureTransform
from .step import (
    CachedStep,
    DecodingMemory,
    GraphRunner,
    GuidedBatch,
    StepWeights,
    count_branches,
    gather_tokens,
    scatter_tokens,
)

__all__ = ["count_chains", "resume", "sequential"]

_embed_next = functools.partial(dispatch.call, "embed_next")  # without the checks of its arguments, as in step


def sequential(
    transformer: CausalTransformer,
    z: Tensor,
    context: Context = NO_CONTEXT,
    guidance: Guidance | None = None,
    memory: DecodingMemory | None = None,
) -> tuple[Tensor, int]:
    """Decode latents ``(B, N, D)`` to tokens ``(B, N, D)``, both in generation order; also return the passes.

    The first token is known: it is its own latent. The ``context`` is that of each sample in each branch of guidance,
    the ``memory`` that of other blocks, if they are to share it.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x, num_steps = z.clone(), z.shape[1] - 1
    weights = StepWeights(transformer, z.dtype, z.shape[1])
    num_chains = count_chains(z.device, len(z), len(z) * count_branches(guidance), *weights.embedding.shape)
    halves = torch.arange(len(z), device=z.device).chunk(num_chains)
    parts = zip(x.chunk(num_chains), z.chunk(num_chains), map(context.select, halves), strict=True)
    # Chains run side by side, each with a cache of its own.
    place = memory if num_chains == 1 else None
    chains = [_chain(transformer, weights, *part, guidance, memory=place) for part in parts]
    runner = GraphRunner(z.device, memory)
    # The step has cast its weights itself.
    with torch.autocast(z.device.type, enabled=False):
        for _ in range(num_steps):
            runner(*chains)
    return x, num_steps


def resume(
    transformer: CausalTransformer,
    step: CachedStep,
    x: Tensor,
    z: Tensor,
    context: Context,
    guidance: Guidance | None,
    position: int,
    memory: DecodingMemory | None = None,
) -> None:
    """Decode the tokens behind a position, the same in all rows, into x ``(B, N, D)``, which has all before.

    The ``step`` has run over these, and its cache holds their keys and values.
    """
    advance = _chain(transformer, step.weights, x, z, context, guidance, position, step.caches)
    runner = GraphRunner(z.device, memory)
    with torch.autocast(z.device.type, enabled=False):
        for _ in range(position, z.shape[1] - 1):
            runner(advance)


def count_chains(device: torch.device, samples: int, rows: int, num_tokens: int, channels: int) -> int:
    """Return 2 where two halves of a batch are to be decoded side by side, else 1.

    Halves read all weights twice, ``12 L C^2`` elements per step, but the cache once as before: ``L R N C`` elements in
    the average step of R rows. So there are two on a GPU, from two samples on, where the cache is at least twice as
    much as the weights, ``R N >= 24 C``. The rule is a prediction, made by counting; nobody has measured it yet.
    """
    return 2 if device.type == "cuda" and samples > 1 and rows * num_tokens >= 24 * channels else 1


def _chain(
    transformer: CausalTransformer,
    weights: StepWeights,
    x: Tensor,
    z: Tensor,
    context: Context,
    guidance: Guidance | None,
    position: int = 0,
    caches: list[tuple[Tensor, Tensor]] | None = None,
    memory: DecodingMemory | None = None,
) -> Callable[[], None]:
    """Return a function that decodes the next token of some samples into x; the tokens up to ``position`` are there."""
    batch = GuidedBatch(transformer, z, context, guidance)
    step = CachedStep(weights, batch, memory=memory, caches=caches)
    step.positions.fill_(position)
    h = step.embed(batch.repeat(x[:, position : position + 1]))
    tickets = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    fixed = batch.weights, step.positions, weights.proj_in, weights.embedding, step.context, h[:, 0], tickets

    def advance_affine() -> None:
        """Decode the next token; guidance, affine map, embedding and the next position are one operator."""
        (mu, alpha), (mu_ref, alpha_ref) = batch.branches_to_extrapolate(step.run_layers(h), step.positions)
        _embed_next(x, z, mu, alpha, mu_ref, alpha_ref, *fixed)

    def advance_mixture() -> None:
        """Decode the next token; guidance, mixture and embedding are one operator after the other."""
        parameters = tuple(parameter[:, None] for parameter in step.run_layers(h))
        step.positions.add_(1)
        positions = step.positions[: len(x), None].long()
        token = transformer.transform.inverse(gather_tokens(z, positions), *batch.guide(parameters, positions))
        scatter_tokens(x, positions, token)
        h.copy_(step.embed(batch.repeat(token)))

    return advance_mixture if isinstance(transformer.transform, MixtureTransform) else advance_affine
