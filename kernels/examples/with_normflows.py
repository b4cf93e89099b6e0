"""normflows' autoregressive flows, trained as in its README, and what one line more does for their slow direction.

Which one that is depends on the flow. ``AutoregressiveRationalQuadraticSpline`` scores data in one pass per network,
and samples in one per feature. ``MaskedAffineAutoregressive``, unless it stands in a ``Reverse``, is the other way
round: samples are fast, and scores and so training slow. ``accelerate`` returns the same model, with the same
parameters, that uses each weight but once in either. Run it with ``python kernels/examples/with_normflows.py``.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from timeit import timeit

import normflows as nf
import torch
from torch import Tensor

from tarflow_kernels.adapters.normflows import accelerate


def waves(rows: int, features: int) -> Tensor:
    """Draw noisy sines of any frequency up to one and any phase."""
    frequency, phase = torch.rand(rows, 1), 2 * torch.pi * torch.rand(rows, 1)
    return torch.sin(frequency * torch.arange(features) + phase) + 0.1 * torch.randn(rows, features)


def make_model(features: int, layers: int, make: Callable[..., nf.flows.Flow], *sizes: int) -> nf.NormalizingFlow:
    """Make a model as normflows' examples do: flows, and linear permutations between them."""
    flows = []
    for _ in range(layers):
        flows += [make(features, *sizes), nf.flows.LULinearPermute(features)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), flows)


def train(model: nf.NormalizingFlow, features: int, steps: int, rows: int = 64) -> None:
    """Train as in normflows' README."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.forward_kld(waves(rows, features))
        loss.backward()
        optimizer.step()


@torch.no_grad()
def sample(model: nf.NormalizingFlow, rows: int, seed: int = 0) -> Tensor:
    """Sample from the same noise every time."""
    torch.manual_seed(seed)
    return model.sample(rows)[0]


@torch.no_grad()
def score(model: nf.NormalizingFlow, x: Tensor) -> Tensor:
    """Compute log-probabilities, one in each row."""
    return model.log_prob(x)[:, None]


def differentiate(model: nf.NormalizingFlow, x: Tensor) -> Tensor:
    """Compute the gradients that a step of training takes, in one row."""
    made = torch.autograd.grad(model.forward_kld(x), [p for p in model.parameters() if p.requires_grad])
    return torch.cat([gradient.flatten() for gradient in made])[None]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Measure the largest difference, relative to its row: an unfinished flow may throw some samples far."""
    return ((ours - theirs).abs() / (1 + theirs.abs().amax(1, keepdim=True))).max().item()


def medians(repeats: int, *calls: Callable) -> list[float]:
    """Time calls by turns, so that what disturbs one disturbs all; median milliseconds of each."""
    rounds = [[1e3 * timeit(call, number=1) for call in calls] for _ in range(repeats)]
    return [median(times) for times in zip(*rounds, strict=True)]


def main(
    features: int = 32, hidden: int = 64, layers: int = 2, steps: int = 20, rows: int = 128, repeats: int = 3
) -> list[float]:
    """Compare both models, and return how far samples, log-probabilities and gradients are apart."""
    torch.manual_seed(0)
    x, differences = waves(rows, features), []
    calls = partial(sample, rows=rows), partial(score, x=x), partial(differentiate, x=x)
    for make, sizes, slow in (
        (nf.flows.AutoregressiveRationalQuadraticSpline, (2, hidden), calls[:1]),
        (nf.flows.MaskedAffineAutoregressive, (hidden,), calls[1:]),
    ):
        model = make_model(features, layers, make, *sizes)
        train(model, features, steps)
        fast = accelerate(model)

        print(f"{make.__name__} after {steps} steps: {-score(model, x).mean() / features:.2f} nats per feature")
        differences += [apart(call(fast), call(model)) for call in calls]
        print("same samples to {:.0e}, log-probabilities to {:.0e}, gradients to {:.0e}".format(*differences[-3:]))
        for call in slow:
            ours, theirs = medians(repeats, partial(call, fast), partial(call, model))
            what = f"{call.func.__name__} {rows} rows"
            print(f"{what}: {theirs:.0f} ms by normflows, {ours:.0f} ms accelerated, gain: {theirs / ours:.1f} times")
    return differences


if __name__ == "__main__":
    main()
