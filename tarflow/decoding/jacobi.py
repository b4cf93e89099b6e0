"""The Jacobi decoder: a window of G tokens per row at once, iterated until it no longer moves; exact to a tolerance.

A block's inverse is the fixed point x = F(x) of ``F(x)_i = f_i^-1(z_i)``, where f_i, affine or a mixture with an affine
map behind it, has parameters that see x_<i only; and one parallel pass of the transformer computes F. A row stands at
token p, up to which everything is exact. A pass over x_p ... x_{p+G-1}, against the cache of the tokens before, gives F
of the G tokens behind p:

- token p + 1 is exact, since it depends on exact tokens alone;
- those at and behind it are accepted as they were, not as they are now, for as long as they agree with F: their keys
  and values, which the pass has left in the cache, are then those of the accepted tokens, to the bit. To agree is to
  differ by no more than the tolerance, in latents, ``|f_i(x_i) - z_i| <= tolerance``, or by the rounding of the
  transformer's precision, since bfloat16 does not hold a token to 1e-2 of a latent, and iterating would chase its
  noise;
- the first that disagrees takes its value in F, which is exact given the accepted ones, and the row moves there;
- the rest take their values in F and are iterated further.

So each pass moves each row by at least one token, whatever the others do, and N - 1 passes are the worst case, which is
the sequential decoder's.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..guidance import Guidance
from ..transformer import NO_CONTEXT, CausalTransformer, Context
from .sequential import resume
from .step import CachedStep, DecodingMemory, GraphRunner, GuidedBatch, StepWeights, gather_tokens, scatter_tokens

if TYPE_CHECKING:
    from .decoder import Allowance

__all__ = ["JacobiIteration", "cautious_jacobi", "jacobi"]

LARGEST = 1e15
"""The largest iterate. A larger one, or one that is not a number, is no guess and starts over from its latent.

An infinity would reach through a masked attention to the tokens before it. The squares in a layer norm still hold the
bound.
"""


def jacobi(
    transformer: CausalTransformer,
    z: Tensor,
    context: Context = NO_CONTEXT,
    guidance: Guidance | None = None,
    window: int | None = None,
    tolerance: float = 1e-2,
    memory: DecodingMemory | None = None,
) -> tuple[Tensor, int]:
    """Decode latents ``(B, N, D)`` to tokens ``(B, N, D)``, both in generation order; also return the passes.

    Args:
        context: that of each sample in each branch of guidance.
        window: G, the number of tokens of a row that a pass updates; None is the whole sequence.
        tolerance: the result is the exact inverse, for any transform, of latents each of which differs from z by at
            most this, and by the effect of the rounding of the layers' dtype, ``eps |x_i|``.
        memory: that of other blocks, if they are to share it.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    last = z.shape[1] - 1
    iteration = JacobiIteration(transformer, z, context, guidance, min(window or last, last), tolerance, memory)
    x = torch.empty_like(z)
    passes = 0
    # A pass over whole sequences takes far longer than reading back how far the rows have come.
    passes_per_look = 4 if z.is_cuda and iteration.window < last else 1
    # The step has cast its weights itself.
    with torch.autocast(z.device.type, enabled=False):
        while iteration.retire_finished(x):
            for _ in range(passes_per_look):
                iteration.advance()
            passes += passes_per_look
    return x, passes


def cautious_jacobi(
    transformer: CausalTransformer,
    z: Tensor,
    context: Context,
    guidance: Guidance | None,
    tolerance: float,
    allowance: "Allowance",
    memory: DecodingMemory | None = None,
) -> tuple[Tensor, int]:
    """Decode like :func:`jacobi` for as long as the allowance lets it, and the rest like the sequential decoder.

    The sequential decoder goes on behind the tokens that are accepted in all rows, whose keys and values it finds in
    the cache. Each pass accepts one token per row at least, so that there are N - 1 passes and steps at most.

    Args:
        allowance: says how long the window of the next pass is, and is told how many tokens each has brought.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    last = z.shape[1] - 1
    iteration = JacobiIteration(transformer, z, context, guidance, last, tolerance, memory)
    x = torch.empty_like(z)
    passes, accepted = 0, 0
    window = allowance.window(last)
    with torch.autocast(z.device.type, enabled=False):
        while window and iteration.retire_finished(x):
            iteration.window = window
            iteration.advance()
            before, accepted = accepted, int(iteration.num_accepted.min())
            allowance.settle(window, accepted - before)
            window = allowance.window(last - accepted, window)
            passes += 1
    rows = iteration.batch_index
    if accepted < last:
        rest = context.select(rows)
        resume(transformer, iteration.step, iteration.x, iteration.z, rest, guidance, accepted, memory)
    x[rows] = iteration.x
    return x, passes + last - accepted


class JacobiIteration:
    """The rows that are still decoded, and a pass over their windows.

    Attributes:
        batch_index: the index of each row in the batch, ``(B,)``.
        z, x: latents and iterates, ``(B, N, D)``.
        num_accepted: the position of each row: its tokens up to this one are exact. int64 ``(B,)``, on the device.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        z: Tensor,
        context: Context,
        guidance: Guidance | None,
        window: int,
        tolerance: float,
        memory: DecodingMemory | None = None,
    ):
        self.batch = GuidedBatch(transformer, z, context, guidance)
        self.step = CachedStep(StepWeights(transformer, z.dtype, z.shape[1]), self.batch, window, memory)
        self.refine = transformer.transform.refine
        self.last = z.shape[1] - 1
        self.window = window
        self.tolerance = tolerance
        self.rounding = torch.finfo(self.step.qkv.dtype).eps
        self.batch_index = torch.arange(len(z), device=z.device)
        self.z = z
        self.x = z.clone()
        self.num_accepted = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        self.runner = GraphRunner(z.device, memory)

    def advance(self) -> None:
        """Run one pass."""
        self.runner(self.update_window)

    def retire_finished(self, x: Tensor) -> bool:
        """Write finished rows to x once they are a quarter of all; return whether there are rows to go on with."""
        accepted = self.num_accepted.tolist()
        live = [row for row, position in enumerate(accepted) if position < self.last]
        if len(live) <= 0.75 * len(accepted):
            x[self.batch_index] = self.x
            self._select(torch.tensor(live, dtype=torch.int64, device=x.device))
        if live and not x.is_cuda:  # a CUDA graph keeps its shapes
            self.window = min(self.window, self.last - min(accepted))
        return bool(live)

    def update_window(self) -> None:
        """Update the window of every row; at the end of a sequence it stays whole, reaching back over exact tokens."""
        start = self.num_accepted.clamp(max=self.last - self.window)
        inputs = start[:, None] + self.step.offsets[: self.window]
        positions = inputs + 1
        old, z = gather_tokens(self.x, positions), gather_tokens(self.z, positions)
        self.step.positions.copy_(self.batch.repeat(start))
        parameters = self.batch.guide(self.step(self.batch.repeat(gather_tokens(self.x, inputs))), positions)
        new, agrees = self.refine(old, z, self.tolerance, self.rounding, *parameters)

        sound = new.abs() < LARGEST
        agrees = (sound & agrees).all(-1)
        known = positions <= self.num_accepted[:, None]
        run_length = (agrees | known).cumprod(1).sum(1)
        num_accepted = start + (run_length + 1).clamp(max=self.window)
        first = (positions == num_accepted[:, None])[..., None]
        held = (positions < num_accepted[:, None])[..., None]
        iterate = torch.where(held, old, torch.where(sound | first, new, z))
        scatter_tokens(self.x, positions, iterate)
        self.num_accepted.copy_(num_accepted)

    def _select(self, rows: Tensor) -> None:
        self.step.select(self.batch.rows_of(rows, len(self.batch_index)))
        self.batch_index, self.z, self.x, self.num_accepted = (
            t[rows] for t in (self.batch_index, self.z, self.x, self.num_accepted)
        )
        self.runner = GraphRunner(rows.device, self.runner.memory)
