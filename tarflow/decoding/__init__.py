"""Inverting a block: latents to tokens.

**The problem.** A block maps tokens x to latents by ``z_i = f_i(x_i)``, where f_i increases in each value of x_i and
has parameters that see x_<i only: ``f_i(x) = (x - mu_i) exp(-alpha_i)``, perhaps with a mixture before it
(:mod:`tarflow.coupling`). All latents take one pass of its transformer; on the way back, token i has to wait for all
before it.

**Sequential** (:mod:`.sequential`). N - 1 passes over one token per row, against a key-value cache.

**Jacobi** (:mod:`.jacobi`). The inverse is the one fixed point of ``F(x)_i = f_i^-1(z_i)``, and a parallel pass
computes F. Iterating it over a window of G tokens per row, and freezing what agrees, takes far fewer passes: most
tokens of a trained block depend on the tokens just before them weakly, in all blocks but the one that is generated
first very weakly.

**Why it is exact.** A token is frozen at a value x_i only when a pass over frozen tokens found
``|f_i(x_i) - z_i| <= tolerance``, which for an affine f_i is to say ``|x_i - F(x)_i| <= tolerance * exp(alpha_i)``.
So, forward, the result maps to latents each of which differs from the one asked for by at most the tolerance: it *is*
the inverse, but for rounding, of latents that nobody could tell from those drawn; an error has no way to build up along
the sequence. That holds for either coupling, for each block of a stack and the latents that it is given, and under
guidance for the guided map. (Rounding is that of the layers' precision: what is within ``eps |x_i|`` of F(x)_i, or by
so much beyond the bound of an affine map, passes too, which is nothing in float32; in bfloat16, where that of the
sequential decoder is as large, it keeps the iteration from chasing noise.) In tokens, the distance from the sequential
decoder is the tolerance times the condition of the inverse: for a trained affine model of four blocks less than once
the tolerance in root mean square, and at most :data:`DISTANCE` times for any one value. Between two sharp components of
a mixture the map is all but flat: there a token may move far while its latent hardly does.

**Why it ends.** The token behind a window's first is F of exact tokens, hence exact, so that every pass freezes one
token per row at least, and N - 1 passes are the worst case. A row whose iterates diverge thus decodes sequentially, by
itself: rows stand at their own positions, and those that are finished leave the batch.

**What it costs.** Let a pass over R rows of G tokens take ``a + b R + c R G``: launches and weights, the cache of each
row, the arithmetic of each token. The sequential decoder takes ``(N - 1) (a + (b + c) R)``, Jacobi with P passes at
most ``P (a + b R + c R G)``. So it gains where passes over few rows are bound by a and b (a GPU, which reads weights
and caches; a CPU at batch 1) and loses where they are bound by c. P falls with G, steeply at first, while P G grows.
``auto`` decides by measurement (:mod:`.calibration`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..guidance import Guidance
from ..transformer import CausalTransformer
from .jacobi import jacobi
from .sequential import sequential

NAMES = ("auto", "sequential", "jacobi")

TOLERANCE = 1e-2
"""By how much a latent may differ from the one asked for, unless told otherwise; that of the prior is about one."""

DISTANCE = 40
"""The largest distance of any value of a sample from the sequential decoder's, in multiples of the tolerance.

Measured, not proved: over 90 batches of 16 samples of the trained model that the benchmarks use (3 draws of latents, 5
kinds of guidance, 3 tolerances, 2 windows) the largest was 31, and the root mean square of a batch at most 1.
"""


@dataclass(frozen=True)
class Decoder:
    """How blocks are inverted.

    Args:
        name: ``"sequential"``; ``"jacobi"``; or ``"auto"``, whichever of them a calibration of the model found faster
            for each block on this device, and sequential where there is none.
        window: of ``"jacobi"``: how many tokens of a row a pass updates; None is the whole sequence.
        tolerance: by how much latents, each of them, may differ from those asked for; see :mod:`tarflow.decoding`. The
            sequential decoder has none, which is 0; of the others None is :data:`TOLERANCE`.

    Raises:
        ValueError: an unknown name, a window that is not positive, a negative tolerance, or one of these with a decoder
            that has no use for it.
    """

    name: Literal["auto", "sequential", "jacobi"] = "auto"
    window: int | None = None
    tolerance: float | None = None

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"decoder: expected one of {', '.join(NAMES)}; got {self.name!r}")
        if self.window is not None and self.name != "jacobi":
            raise ValueError(f"window: expected none with the {self.name} decoder, only with jacobi; got {self.window}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1; got {self.window}")
        if self.tolerance is None:
            object.__setattr__(self, "tolerance", 0.0 if self.name == "sequential" else TOLERANCE)
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance: expected a finite number >= 0; got {self.tolerance}")
        if self.tolerance and self.name == "sequential":
            raise ValueError(f"tolerance: expected none with the sequential decoder; got {self.tolerance}")

    @classmethod
    def of(cls, decoder: "str | Decoder") -> "Decoder":
        """A decoder, or the one of that name."""
        return decoder if isinstance(decoder, Decoder) else cls(decoder)

    def __call__(
        self, transformer: CausalTransformer, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None
    ) -> tuple[Tensor, int]:
        """Latents ``(B, N, D)`` to tokens, both in the order in which the block generates; and the passes it took."""
        if self.name == "jacobi":
            return jacobi(transformer, z, labels, guidance, self.window, self.tolerance)
        return sequential(transformer, z, labels, guidance)

    def __str__(self) -> str:
        return self.name if self.window is None else f"{self.name}, window {self.window}"


@dataclass(frozen=True)
class Decoded:
    """What inverting a block took: ``passes`` of its transformer, where the sequential decoder takes ``steps``."""

    block: int
    decoder: Decoder
    batch: int
    passes: int
    steps: int


Report = Callable[[Decoded], None]
