"""A zuko flow whose univariate maps come from a causal transformer, and whose inverse decodes with a key-value cache.

Feature i goes through a monotonic spline whose parameters come from a small transformer of the features before it,
``y_i = spline(x_i; transformer(x_<i))``. A density takes one parallel pass. The inverse finds one feature after the
other: zuko's own runs the transformer over all of them each time, the one below over the new one alone, against the
cached keys and values of those before. Run it with ``python kernels/examples/attention_in_zuko.py``.
"""

from functools import partial
from statistics import median
from timeit import timeit

import torch
import zuko
from torch import Tensor, nn

from tarflow_kernels import CausalSelfAttention, KVCache

SHAPES = [(8,), (8,), (7,)]  # of a spline with 8 bins: widths, heights and the slopes between bins


class Layer(nn.Module):
    """A pre-norm transformer layer over whole sequences, or over new tokens and ``(cache_k, cache_v, positions)``."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(channels), CausalSelfAttention(channels, num_heads)
        widen, narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.mlp = nn.Sequential(nn.LayerNorm(channels), widen, nn.GELU(), narrow)

    def forward(self, h: Tensor, *cache: Tensor) -> Tensor:
        attend = self.attention.decode if cache else self.attention
        h = h + attend(self.norm(h), *cache)
        return h + self.mlp(h)


class CausalTransformer(zuko.lazy.LazyTransform):
    """A network as zuko has it in a flow: called with a context, here ignored, it returns the transform."""

    def __init__(self, features: int, channels: int, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(1, channels)
        self.position_embedding = nn.Parameter(0.1 * torch.randn(features, channels))
        self.layers = nn.ModuleList(Layer(channels, num_heads) for _ in range(num_layers))
        self.out = nn.Linear(channels, sum(size for (size,) in SHAPES))
        nn.init.zeros_(self.out.weight)  # an untrained spline is about the identity

    def forward(self, c: Tensor | None = None) -> "CachedTransform":
        return CachedTransform(self)

    def meta(self, x: Tensor) -> zuko.transforms.DependentTransform:
        previous = nn.functional.pad(x[:, :-1], (1, 0))  # shifted by one, so that feature i sees x_<i
        return zuko.transforms.DependentTransform(self.splines(previous, self.position_embedding), 1)

    def splines(self, previous: Tensor, position: Tensor, caches=None) -> zuko.transforms.MonotonicRQSTransform:
        """Make the spline of each feature from the value before it and, by attention, from all earlier ones."""
        h = self.embed(previous[..., None]) + position
        for layer, cache in zip(self.layers, caches or [()] * len(self.layers), strict=True):
            h = layer(h, *cache)
        return zuko.transforms.MonotonicRQSTransform(*zuko.utils.unpack(self.out(h), SHAPES))


class CachedTransform(zuko.transforms.AutoregressiveTransform):
    """A map of features ``(B, D)`` whose inverse is new; value and log-det are zuko's, in one pass."""

    def __init__(self, network: CausalTransformer) -> None:
        super().__init__(network.meta, passes=len(network.position_embedding))
        self.network = network

    @torch.no_grad()
    def _inverse(self, y: Tensor) -> Tensor:
        layers, (rows, features) = self.network.layers, y.shape
        heads, head_dim = layers[0].attention.num_heads, layers[0].attention.head_dim
        cache = KVCache.allocate(len(layers), rows, heads, features, head_dim, device=y.device, dtype=y.dtype)
        positions = torch.zeros(rows, dtype=torch.int32, device=y.device)
        caches = [(cache_k, cache_v, positions) for cache_k, cache_v in cache]
        x = [y.new_zeros(rows, 1)]  # what stands before the first feature
        for y_i, position in zip(y.split(1, dim=1), self.network.position_embedding, strict=True):
            x.append(self.network.splines(x[-1], position, caches).inv(y_i))
            positions += 1
        return torch.cat(x[1:], dim=1)


def make_flow(features: int, channels: int) -> zuko.flows.Flow:
    """Make a flow of two transforms, the second of which goes from the last feature to the first."""
    first, second = CausalTransformer(features, channels), CausalTransformer(features, channels)
    backwards = zuko.transforms.PermutationTransform, torch.arange(features).flip(0)
    normal = zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features)
    reverse = zuko.lazy.UnconditionalTransform(*backwards, buffer=True)
    return zuko.flows.Flow([first, reverse, second], zuko.lazy.UnconditionalDistribution(*normal, buffer=True))


def waves(rows: int, features: int) -> Tensor:
    """Draw noisy sines of any phase and one of three frequencies: the next value depends on all that came before."""
    frequency, phase = torch.tensor([0.4, 0.9, 1.5])[torch.randint(3, (rows, 1))], 2 * torch.pi * torch.rand(rows, 1)
    return torch.sin(frequency * torch.arange(features) + phase) + 0.1 * torch.randn(rows, features)


@torch.no_grad()
def time_inverses(flow: zuko.flows.Flow, x: Tensor, repeats: int) -> list[float]:
    """Time our inverse of one transform and zuko's by turns: what disturbs one disturbs both; median seconds."""
    ours = flow().transform.transforms[0]
    inverses = ours.inv, zuko.transforms.AutoregressiveTransform(ours.meta, ours.passes).inv
    y = ours(x)
    rounds = [[timeit(partial(inverse, y), number=1) for inverse in inverses] for _ in range(repeats)]
    return [median(seconds) for seconds in zip(*rounds, strict=True)]


def main(features: int = 32, channels: int = 32, steps: int = 100, rows: int = 64, repeats: int = 5) -> zuko.flows.Flow:
    """Train a flow, print what its cache gains, and return it."""
    torch.manual_seed(0)
    flow, x = make_flow(features, channels), waves(rows, features)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)

    print(f"log-likelihood before training: {flow().log_prob(x).mean() / features:.3f} nats per feature")
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow().log_prob(waves(32, features)).mean()).backward()
        optimizer.step()
    print(f"after {steps} steps: {flow().log_prob(x).mean() / features:.3f}")

    transform = flow().transform
    print(f"inv(forward(x)) is x to {(transform.inv(transform(x)) - x).abs().max():.0e}")
    ours, zukos = (1e3 * seconds for seconds in time_inverses(flow, x, repeats))
    print(f"inverse of {rows} rows: {ours:.0f} ms in {features} cached steps, {zukos:.0f} ms in as many full passes")
    print(f"gain of the cache: {zukos / ours:.1f} times")
    return flow


if __name__ == "__main__":
    main()
