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
- the first that disagrees becomes what F says, which is exact given the accepted ones, and the row moves there;
- the rest becomes what F says and is iterated further.

So each pass moves each row by at least one token, whatever the others do, and N - 1 passes are the worst case, which is
the sequential decoder's.
"""

import torch
from torch import Tensor

from ..guidance import Guidance
from ..transformer import CausalTransformer
from .branches import Branches
from .graphs import Replayed
from .step import Step, at, put

# An iterate beyond this, or one that is not a number, starts over from its latent: it is no guess, and an infinity
# would reach through a masked attention to the tokens before it. The squares of a layer norm still hold the bound.
LARGEST = 1e15


def jacobi(
    transformer: CausalTransformer,
    z: Tensor,
    labels: Tensor | None = None,
    guidance: Guidance | None = None,
    window: int | None = None,
    tolerance: float = 1e-2,
) -> tuple[Tensor, int]:
    """Latents ``(B, N, D)`` to tokens ``(B, N, D)``, both in the order in which the block generates; and the passes.

    Args:
        window: G, the tokens of a row that a pass updates; None is the whole sequence.
        tolerance: the result is the exact inverse, for either coupling, of latents that differ from z by at most this,
            each, and by what the rounding of the layers' dtype, ``eps |x_i|``, does to them.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    last = z.shape[1] - 1
    iterates = _Iterates(transformer, z, labels, guidance, min(window or last, last), tolerance)
    x = torch.empty_like(z)
    passes = 0
    # A pass over whole sequences takes far longer than looking at what it did.
    look = 4 if z.is_cuda and iterates.window < last else 1
    # The step has cast its weights itself.
    with torch.autocast(z.device.type, enabled=False):
        while iterates.remain(x):
            for _ in range(look):
                iterates.advance()
            passes += look
    return x, passes


class _Iterates:
    """The rows that are still decoded, and a pass over their windows.

    Attributes:
        home: the index of each row in the batch, ``(B,)``.
        z, x: latents and iterates, ``(B, N, D)``.
        exact: where each row stands: its tokens up to this one are exact. int64 ``(B,)``, on the device.
    """

    def __init__(self, transformer, z, labels, guidance, window, tolerance):
        self.branches = Branches(transformer, z, labels, guidance)
        self.step = Step(transformer, self.branches, z.dtype, window)
        self.refine = transformer.coupling.refine
        self.last = z.shape[1] - 1
        self.window = window
        self.tolerance = tolerance
        self.rounding = torch.finfo(self.step.qkv.dtype).eps
        self.home = torch.arange(len(z), device=z.device)
        self.z = z
        self.x = z.clone()
        self.exact = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        self.replayed = Replayed(z.device)

    def advance(self) -> None:
        """One pass."""
        self.replayed(self._advance)

    def remain(self, x: Tensor) -> bool:
        """Whether there are rows to go on with; when a quarter of them is finished they leave for x."""
        standing = self.exact.tolist()
        live = [row for row, place in enumerate(standing) if place < self.last]
        if len(live) <= 0.75 * len(standing):
            x[self.home] = self.x
            self._keep(torch.tensor(live, dtype=torch.int64, device=x.device))
        if live and not x.is_cuda:  # there a graph keeps its shapes
            self.window = min(self.window, self.last - min(standing))
        return bool(live)

    def _keep(self, rows: Tensor) -> None:
        self.step.keep(self.branches.rows_of(rows, len(self.home)))
        self.home, self.z, self.x, self.exact = (t[rows] for t in (self.home, self.z, self.x, self.exact))
        self.replayed = Replayed(rows.device)

    def _advance(self) -> None:
        """At the end of a sequence the window stays whole and reaches back over tokens that are exact."""
        start = self.exact.clamp(max=self.last - self.window)
        inputs = start[:, None] + self.step.offsets[: self.window]
        places = inputs + 1
        old, z = at(places, self.x), at(places, self.z)
        self.step.positions.copy_(self.branches.repeat(start))
        parameters = self.branches.guide(self.step(self.branches.repeat(at(inputs, self.x))), places)
        new, agrees = self.refine(old, z, self.tolerance, self.rounding, *parameters)

        sound = new.abs() < LARGEST
        agrees = (sound & agrees).all(-1)
        known = places <= self.exact[:, None]
        accepted = (agrees | known).cumprod(1).sum(1)
        exact = start + (accepted + 1).clamp(max=self.window)
        first = (places == exact[:, None])[..., None]
        held = (places < exact[:, None])[..., None]
        iterate = torch.where(held, old, torch.where(sound | first, new, z))
        put(places, self.x, iterate)
        self.exact.copy_(exact)
