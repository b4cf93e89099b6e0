"""Scores that compare two sets of images by their features: two distances, and precision and recall.

This is the mathematics alone, for the features of any network; :mod:`tarflow.features` has two such networks. Features
are float ``(n, D)``, and all is computed in float64.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["FeatureSums", "frechet_distance", "kernel_distance", "precision_recall"]


class FeatureSums(NamedTuple):
    """Sums over a set of features f, float64, of which a Frechet distance is made.

    Those of a set that is spread over batches, files or processes are the sums of those of its parts.
    """

    num: Tensor
    """The number n of features, ``()``."""
    total: Tensor
    """``sum f``, ``(D,)``."""
    outer: Tensor
    """``sum f f^T``, ``(D, D)``."""

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Sum over features ``(n, D)``."""
        features = features.double()
        return cls(features.new_tensor(len(features)), features.sum(0), features.mT @ features)

    def merge(self, other: "FeatureSums") -> "FeatureSums":
        """Return the sums over the union of two disjoint sets."""
        return FeatureSums(self.num + other.num, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """``m = sum f / n``, ``(D,)``."""
        return self.total / self.num

    @property
    def covariance(self) -> Tensor:
        """``(sum f f^T - n m m^T) / (n - 1)``, ``(D, D)``."""
        return (self.outer - torch.outer(self.total, self.mean)) / (self.num - 1)


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """Return the squared Frechet distance between the Gaussians of the means m and covariances S of two sets.

    ``d^2 = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``; the trace of the root is the sum of the singular values
    of ``R_a^T R_b`` for any R with ``R R^T = S``. The bias is positive and falls as 1/n with the sizes of the sets.

    Raises:
        ValueError: a set of fewer than two features has no covariance.

    Source: Heusel et al. (arXiv 1706.08500).
    """
    for sums in (a, b):
        if sums.num < 2:
            raise ValueError(f"features: expected at least 2 in a set; got {sums.num:.0f}")
    cross = torch.linalg.svdvals(_root(a.covariance).mT @ _root(b.covariance)).sum()
    squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, squared.item())


def _root(covariance: Tensor) -> Tensor:
    """Return an R with ``R R^T`` the covariance, ``(D, D)``."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Return the squared maximum mean discrepancy of two sets for the kernel ``k(f, g) = (f^T g / D + 1)^3``.

    It is the unbiased estimate on random subsets of m features of each set,
    ``sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_ij k(x_i, y_j) / m^2``.

    Args:
        x, y: features ``(n, D)``.
        subsets: number of the subsets.
        subset_size: m.
        generator: source of the subsets, on the CPU.

    Returns:
        the mean over the subsets and their standard deviation.

    Raises:
        ValueError: m is below 2 or larger than one of the sets.

    Source: KID, Binkowski et al. (arXiv 1801.01401), with the defaults of torch-fidelity and torchmetrics.
    """
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(f"subset_size: expected 2 to {min(len(x), len(y))}, the smaller set; got {subset_size}")
    estimates = []
    for _ in range(subsets):
        f, g = (s[torch.randperm(len(s), generator=generator)[:subset_size].to(s.device)].double() for s in (x, y))
        of_f, of_g = _kernel(f, f), _kernel(g, g)
        within = of_f.sum() - of_f.trace() + of_g.sum() - of_g.trace()
        estimates.append(within / (subset_size * (subset_size - 1)) - 2 * _kernel(f, g).mean())
    values = torch.stack(estimates)
    return values.mean().item(), values.std(correction=0).item()


def _kernel(f: Tensor, g: Tensor) -> Tensor:
    return (f @ g.mT / f.shape[1] + 1) ** 3


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return the share of generated features within the real ones, and of real ones within the generated.

    A feature is within a set where it is no farther from one of its members than that one's k-th nearest neighbour in
    the set is. Both depend on the sizes of the sets, which should be equal.

    Args:
        real, generated: features ``(n, D)``.
        neighbours: k.

    Raises:
        ValueError: a set has no more than k features.

    Source: Kynkaanniemi et al. (arXiv 1904.06991), as torch-fidelity computes it.
    """
    if min(len(real), len(generated)) <= neighbours:
        got = f"{len(real)} and {len(generated)}"
        raise ValueError(f"real, generated: expected more than {neighbours} features in each; got {got}")
    real, generated = real.double(), generated.double()
    return _share_within(real, generated, neighbours), _share_within(generated, real, neighbours)


def _share_within(members: Tensor, points: Tensor, neighbours: int) -> float:
    """Return the share of the points that lie within a set, a thousand rows of distances at a time."""
    # A member is the nearest to itself.
    radii = [torch.cdist(part, members).kthvalue(neighbours + 1).values for part in members.split(1000)]
    radius = torch.cat(radii)
    within = [(torch.cdist(part, members) <= radius).any(1) for part in points.split(1000)]
    return torch.cat(within).double().mean().item()
