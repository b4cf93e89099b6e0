"""nflows' masked autoregressive flow, as in its example of two moons, and what one line more does for the samples.

A density takes nflows one pass through each network, a sample one pass per feature: ``accelerate`` returns the same
flow, with the same parameters, in which each weight is used but once. That saves nothing for two features, and its own
steps cost something, so the page ends with noisy sines, which have more features.
Run it with ``python kernels/examples/with_nflows.py``.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from timeit import timeit

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation
from torch import Tensor

from tarflow_kernels.adapters.nflows import accelerate


def moons(rows: int) -> Tensor:
    """Draw from two half circles, one of them upside down and moved, with noise."""
    angle, lower = torch.pi * torch.rand(rows), torch.randint(2, (rows,))
    upper = torch.stack((torch.cos(angle), torch.sin(angle)), dim=1)
    shape = torch.where(lower[:, None] == 1, torch.tensor([1.0, 0.5]) - upper, upper)
    return shape + 0.1 * torch.randn(rows, 2)


def waves(rows: int, features: int) -> Tensor:
    """Draw noisy sines of any frequency up to one and any phase."""
    frequency, phase = torch.rand(rows, 1), 2 * torch.pi * torch.rand(rows, 1)
    return torch.sin(frequency * torch.arange(features) + phase) + 0.1 * torch.randn(rows, features)


def make_flow(features: int, hidden: int, layers: int) -> Flow:
    """Make a flow as in nflows' example."""
    transforms = []
    for _ in range(layers):
        transforms.append(ReversePermutation(features=features))
        transforms.append(MaskedAffineAutoregressiveTransform(features=features, hidden_features=hidden))
    return Flow(CompositeTransform(transforms), StandardNormal(shape=[features]))


def train(flow: Flow, draw: Callable[[int], Tensor], steps: int, rows: int = 128) -> None:
    """Train as in nflows' example."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -flow.log_prob(inputs=draw(rows)).mean()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def sample(flow: Flow, rows: int, seed: int = 0) -> Tensor:
    """Sample from the same noise every time."""
    torch.manual_seed(seed)
    return flow.sample(rows)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Measure the largest difference, relative to its row: an unfinished flow may throw some samples far."""
    return ((ours - theirs).abs() / (1 + theirs.abs().amax(1, keepdim=True))).max().item()


def medians(repeats: int, *calls: Callable) -> list[float]:
    """Time calls by turns, so that what disturbs one disturbs all; median milliseconds of each."""
    rounds = [[1e3 * timeit(call, number=1) for call in calls] for _ in range(repeats)]
    return [median(times) for times in zip(*rounds, strict=True)]


def compare(flow: Flow, draw: Callable[[int], Tensor], steps: int, rows: int, repeats: int) -> tuple[float, float]:
    """Train a flow, accelerate it, and say what that changes: samples, log-probabilities and time."""
    train(flow, draw, steps)
    fast = accelerate(flow)

    x = draw(rows)
    with torch.no_grad():
        ours, theirs = (f.log_prob(x)[:, None] for f in (fast, flow))
    differences = apart(sample(fast, rows), sample(flow, rows)), apart(ours, theirs)
    print(f"{x.shape[1]} features after {steps} steps: {-theirs.mean() / x.shape[1]:.2f} nats per feature")
    print("same samples to {:.0e}, log-probabilities to {:.0e}".format(*differences))
    ours, theirs = medians(repeats, partial(sample, fast, rows), partial(sample, flow, rows))
    print(f"{rows} samples: {theirs:.0f} ms by nflows, {ours:.0f} ms accelerated, gain: {theirs / ours:.1f} times")
    return differences


def main(
    features: int = 64, hidden: int = 64, layers: int = 5, steps: int = 100, rows: int = 256, repeats: int = 3
) -> list[float]:
    """Compare both flows, and return how far samples and log-probabilities are apart."""
    torch.manual_seed(0)
    problems = (
        (moons, make_flow(2, 4, layers)),
        (partial(waves, features=features), make_flow(features, hidden, layers)),
    )
    return [difference for draw, flow in problems for difference in compare(flow, draw, steps, rows, repeats)]


if __name__ == "__main__":
    main()
