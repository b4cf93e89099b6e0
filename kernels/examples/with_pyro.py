"""Pyro's autoregressive flows, fitted as in its tutorial on normalizing flows, and what one line more does for the fit.

In Pyro the slow direction is the score: a sample takes one pass through the network, a log-probability, and so a step
of training, one per feature. ``accelerate`` returns the same distribution, with the same parameters, that uses each
weight but once. ``neural_autoregressive`` has no inverse in Pyro, so that it cannot be fitted to data; accelerated it
can. Run it with ``python kernels/examples/with_pyro.py``.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from timeit import timeit

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from torch import Tensor

from tarflow_kernels.adapters.pyro import accelerate


def waves(rows: int, features: int) -> Tensor:
    """Draw noisy sines of any frequency up to one and any phase."""
    frequency, phase = torch.rand(rows, 1), 2 * torch.pi * torch.rand(rows, 1)
    return torch.sin(frequency * torch.arange(features) + phase) + 0.1 * torch.randn(rows, features)


def make_flow(transform: torch.nn.Module, features: int) -> dist.TransformedDistribution:
    """Make a flow as in Pyro's tutorial."""
    base_dist = dist.Normal(torch.zeros(features), torch.ones(features))
    return dist.TransformedDistribution(base_dist, [transform])


def fit(flow: dist.TransformedDistribution, x: Tensor, steps: int) -> float:
    """Fit as in Pyro's tutorial, and return the last loss, in nats per feature."""
    optimizer = torch.optim.Adam(flow.transforms[0].parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        flow.clear_cache()
    return loss.item() / x.shape[1]


def differentiate(flow: dist.TransformedDistribution, x: Tensor) -> Tensor:
    """Compute the gradients that a step of training takes, in one row."""
    flow.clear_cache()
    made = torch.autograd.grad(-flow.log_prob(x).mean(), list(flow.transforms[0].parameters()))
    return torch.cat([gradient.flatten() for gradient in made])[None]


@torch.no_grad()
def sample_and_score(flow: dist.TransformedDistribution, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sample from the same noise every time, and score, which Pyro's neural transform can for samples alone."""
    torch.manual_seed(seed)
    x = flow.sample((rows,))
    return x, flow.log_prob(x)[:, None]


@torch.no_grad()
def score(flow: dist.TransformedDistribution, x: Tensor) -> Tensor:
    """Compute log-probabilities, one in each row."""
    flow.clear_cache()
    return flow.log_prob(x)[:, None]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Measure the largest difference, relative to its row."""
    return ((ours - theirs).abs() / (1 + theirs.abs().amax(1, keepdim=True))).max().item()


def medians(repeats: int, *calls: Callable) -> list[float]:
    """Time calls by turns, so that what disturbs one disturbs all; median milliseconds of each."""
    rounds = [[1e3 * timeit(call, number=1) for call in calls] for _ in range(repeats)]
    return [median(times) for times in zip(*rounds, strict=True)]


def main(features: int = 24, rows: int = 128, steps: int = 5, repeats: int = 3) -> list[float]:
    """Compare flows, and return how far samples, log-probabilities and gradients are apart."""
    torch.manual_seed(0)
    x = waves(rows, features)

    flow = make_flow(T.neural_autoregressive(features), features)
    fast = accelerate(flow)
    nats = fit(fast, x, steps)
    samples, log_probs = sample_and_score(flow, rows)
    differences = [apart(sample_and_score(fast, rows)[0], samples), apart(score(fast, samples), log_probs)]
    print(f"neural_autoregressive, fitted by its new inverse in {steps} steps: {nats:.2f} nats per feature")
    print("same samples to {:.0e}, their log-probabilities to {:.0e}".format(*differences))

    flow = make_flow(T.spline_autoregressive(features), features)
    nats = fit(flow, x, steps)
    fast = accelerate(flow)
    differences += [apart(*(sample_and_score(f, rows)[0] for f in (fast, flow)))]
    differences += [apart(call(fast, x), call(flow, x)) for call in (score, differentiate)]
    print(f"spline_autoregressive after {steps} steps: {nats:.2f} nats per feature")
    print("same samples to {:.0e}, log-probabilities to {:.0e}, gradients to {:.0e}".format(*differences[2:]))
    for call in score, differentiate:
        ours, theirs = medians(repeats, partial(call, fast, x), partial(call, flow, x))
        what = f"{call.__name__} {rows} rows"
        print(f"{what}: {theirs:.0f} ms by Pyro, {ours:.0f} ms accelerated, gain: {theirs / ours:.1f} times")
    return differences


if __name__ == "__main__":
    main()
