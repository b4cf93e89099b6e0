"""zuko's conditional flows, trained and sampled as in its README, and what one line more does for the samples.

The data are noisy sines given their frequency. A density takes zuko one pass through each network, a sample one pass
per feature: ``accelerate`` returns the same flow, with the same parameters, in which each weight is used but once. A
univariate that zuko lacks, a mixture of logistics, comes with it: ``main(["mixtures"])`` is the page of that.
Run it with ``python kernels/examples/with_zuko.py``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from timeit import timeit

import torch
import zuko
from torch import Tensor

from tarflow_kernels.adapters.zuko import MixtureTransform, accelerate

FLOWS = {
    "MAF": zuko.flows.MAF,
    "NSF": zuko.flows.NSF,
    "mixtures": partial(zuko.flows.MAF, univariate=MixtureTransform, shapes=[(8,), (8,), (8,)]),
}


def waves(rows: int, features: int) -> tuple[Tensor, Tensor]:
    """Draw noisy sines of any phase, and their frequencies: the context."""
    frequency, phase = 0.3 + torch.rand(rows, 1), 2 * torch.pi * torch.rand(rows, 1)
    x = torch.sin(frequency * torch.arange(features) + phase) + 0.1 * torch.randn(rows, features)
    return x, frequency


def train(flow: zuko.flows.Flow, features: int, steps: int, rows: int = 64) -> None:
    """Train as in zuko's README."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in range(steps):
        x, c = waves(rows, features)
        loss = -flow(c).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sample(flow: zuko.flows.Flow, c: Tensor, rows: int, seed: int = 0) -> Tensor:
    """Sample as in zuko's README, from the same noise every time."""
    torch.manual_seed(seed)
    return flow(c).sample((rows,))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Measure the largest difference, relative to its row: an unfinished flow may throw some samples far."""
    return ((ours - theirs).abs() / (1 + theirs.abs().amax(1, keepdim=True))).max().item()


def medians(repeats: int, *calls: Callable) -> list[float]:
    """Time calls by turns, so that what disturbs one disturbs all; median milliseconds of each."""
    rounds = [[1e3 * timeit(call, number=1) for call in calls] for _ in range(repeats)]
    return [median(times) for times in zip(*rounds, strict=True)]


def compare(flow: zuko.flows.Flow, features: int, steps: int, rows: int, repeats: int) -> tuple[float, float]:
    """Train a flow, accelerate it, and say what that changes: samples, log-probabilities and time."""
    train(flow, features, steps)
    fast = accelerate(flow)

    x, c = waves(rows, features)
    with torch.no_grad():
        ours, theirs = (f(c).log_prob(x)[:, None] for f in (fast, flow))
    differences = apart(sample(fast, c[0], rows), sample(flow, c[0], rows)), apart(ours, theirs)
    print(f"after {steps} steps: {-theirs.mean() / features:.2f} nats per feature")
    print("same samples to {:.0e}, log-probabilities to {:.0e}".format(*differences))
    ours, theirs = medians(repeats, partial(sample, fast, c[0], rows), partial(sample, flow, c[0], rows))
    print(f"{rows} samples: {theirs:.0f} ms by zuko, {ours:.0f} ms accelerated, gain: {theirs / ours:.1f} times")
    return differences


def main(
    names: Sequence[str] = ("MAF", "NSF"),
    features: int = 32,
    hidden: int = 128,
    steps: int = 50,
    rows: int = 128,
    repeats: int = 3,
) -> list[float]:
    """Compare every flow, and return how far samples and log-probabilities are apart."""
    torch.manual_seed(0)
    differences = []
    for name in names:
        print(name, end=" ")
        flow = FLOWS[name](features, 1, transforms=3, hidden_features=[hidden] * 3)
        differences += compare(flow, features, steps, rows, repeats)
    return differences


if __name__ == "__main__":
    main()
