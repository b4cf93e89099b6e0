"""Inverting a block: latents to tokens.

**The problem.** A block maps tokens x to latents by ``z_i = f_i(x_i)``, where f_i increases in each value of x_i and
has parameters that see x_<i only: ``f_i(x) = (x - mu_i) exp(-alpha_i)``, perhaps with a mixture before it
(:mod:`tarflow.transforms`). All latents take one pass of its transformer; on the way back, token i has to wait for all
tokens before it.

**Sequential** (:mod:`.sequential`). N - 1 passes over one token per row, against a key-value cache.

**Jacobi** (:mod:`.jacobi`). The inverse is the one fixed point of ``F(x)_i = f_i^-1(z_i)``, and a parallel pass
computes F. Iterating it over a window of G tokens per row, and freezing what agrees, takes far fewer passes: most
tokens of a trained block depend on the tokens just before them weakly, in all blocks but the one that is generated
first very weakly.

**Why it is exact.** A token is frozen at a value x_i only when a pass over frozen tokens found
``|f_i(x_i) - z_i| <= tolerance``, which for an affine f_i is to say ``|x_i - F(x)_i| <= tolerance * exp(alpha_i)``.
So, forward, the result maps to latents each of which differs from the one asked for by at most the tolerance: it *is*
the inverse, but for rounding, of latents that nobody could tell from those drawn; an error has no way to build up along
the sequence. That holds for either transform, for each block of a stack and the latents that it is given, and under
guidance for the guided map. (Rounding is that of the layers' precision: what is within ``eps |x_i|`` of F(x)_i, or by
so much beyond the bound of an affine map, passes too, some 1e-5 in float32; in bfloat16, where that of the
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

**Which one.** ``auto`` decides by measurement, where the model was calibrated on the device (:mod:`.calibration`).
Where it was not, P is unknown before the passes are run. So ``auto`` stakes time on them: at most a twentieth of what
the sequential decoder takes for the whole flow, and whatever they have saved so far. Costs of passes are those of a
table, for a few rows on a CPU; progress is counted in tokens. Where the stake is lost, the sequential decoder goes on
behind the tokens that are there (:class:`.decoder.Allowance`, :func:`.jacobi.cautious_jacobi`). The block that is
generated first, where passes bring a token or two for long, and all larger batches are decoded sequentially.

The files, in the order in which a sample passes them: :mod:`.decoder` (which decoder inverts a block),
:mod:`.sequential` or :mod:`.jacobi`, :mod:`.step` (one pass of the transformer against its cache, and how a GPU repeats
it: what its graph holds, what stays in place, and the memory that all of this takes).
"""

from typing import TYPE_CHECKING

from ..compatibility import renamed_attributes
from .decoder import DISTANCE, NAMES, TOLERANCE, BlockStatistics, Decoder, DecoderName, ProgressCallback

__all__ = ["DISTANCE", "NAMES", "TOLERANCE", "BlockStatistics", "Decoder", "DecoderName", "ProgressCallback"]

if not TYPE_CHECKING:
    __getattr__ = renamed_attributes(globals(), Decoded="BlockStatistics", Report="ProgressCallback")
