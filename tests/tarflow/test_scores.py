"""Scores are those of torchmetrics, scipy and a formula written out, and have the properties of what they measure."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from tarflow.scores import FeatureSums, frechet_distance, kernel_distance, precision_recall

DIM = 16


def features(seed, num=400, dim=DIM):
    """Features that are correlated, and of another mean and covariance for every seed."""
    generator = torch.Generator().manual_seed(seed)
    mix, shift = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((dim, dim), (dim,)))
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mix / dim**0.5 + 0.3 * shift


def distance(x, y):
    return frechet_distance(FeatureSums.of(x), FeatureSums.of(y))


class AsTheyAre(torch.nn.Identity):
    """A network for torchmetrics that passes features through."""

    num_features = DIM


def of_torchmetrics(kind, x, y, **options):
    metric = kind(feature=AsTheyAre(), **options)
    metric.set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    return metric.compute()


@pytest.mark.parametrize("seed", range(3))
def test_the_frechet_distance_is_that_of_torchmetrics_and_of_scipys_square_root(seed):
    x, y = features(2 * seed), features(2 * seed + 1, num=300)
    expected = of_torchmetrics(FrechetInceptionDistance, x, y, antialias=False).item()
    assert distance(x, y) == pytest.approx(expected, rel=1e-6)
    (m, s), (n, t) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x.numpy(), y.numpy()))
    root = scipy.linalg.sqrtm(s @ t).real
    assert distance(x, y) == pytest.approx(((m - n) ** 2).sum() + np.trace(s + t - 2 * root), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_distance_is_that_of_torchmetrics(seed):
    x, y = features(2 * seed), features(2 * seed + 1, num=300)
    torch.manual_seed(seed)
    mean, deviation = of_torchmetrics(KernelInceptionDistance, x, y, subsets=10, subset_size=50)
    drawn = kernel_distance(x, y, subsets=10, subset_size=50, generator=torch.Generator().manual_seed(seed))
    assert drawn == pytest.approx((mean.item(), deviation.item()), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_their_definition(seed, k):
    real, generated = features(2 * seed, num=60, dim=3).numpy(), features(2 * seed + 1, num=50, dim=3).numpy()

    def share_within(members, points):
        def radius(member):
            return sorted(np.linalg.norm(member - other) for other in members)[k]

        radii = [radius(member) for member in members]
        return np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(members, radii, strict=True)) for p in points])

    expected = share_within(real, generated), share_within(generated, real)
    assert 0 < min(expected) <= max(expected) < 1
    assert precision_recall(torch.tensor(real), torch.tensor(generated), k) == pytest.approx(expected)


def test_precision_and_recall_do_not_depend_on_how_many_distances_are_held_at_a_time():
    real, generated = features(0, num=1500, dim=3), features(1, num=1400, dim=3)
    order, other = torch.randperm(1500), torch.randperm(1400)
    assert precision_recall(real, generated) == precision_recall(real[order], generated[other])


SCORES = {
    "frechet": distance,
    "kernel": lambda x, y: kernel_distance(x, y, subsets=1, subset_size=len(x))[0],
    "precision": lambda x, y: precision_recall(x, y)[0],
}
each_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)


def rotation(seed):
    matrix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(matrix).Q


@each_score
def test_a_rotation_of_both_sets_changes_no_score(score):
    x, y, turn = features(0), features(1), rotation(2)
    assert score(x @ turn, y @ turn) == pytest.approx(score(x, y), rel=1e-9)


@pytest.mark.parametrize("num", [5, 400])
def test_equal_sets_are_at_distance_zero_also_where_they_span_no_space(num):
    x = features(0, num)
    assert distance(x, x.clone()) == pytest.approx(0, abs=1e-7)
    assert precision_recall(x, x) == (1, 1)


def test_sets_of_one_distribution_are_at_kernel_distance_zero_on_average():
    mean, deviation = kernel_distance(features(0, 4000)[::2], features(0, 4000)[1::2], subset_size=500)
    other, _ = kernel_distance(features(0, 2000), features(1, 2000), subset_size=500)
    assert abs(mean) < deviation < other / 10


def test_distances_are_symmetric():
    x, y = features(0), features(1)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-12)
    assert SCORES["kernel"](x, y) == pytest.approx(SCORES["kernel"](y, x), rel=1e-12)
    assert precision_recall(x, y) == precision_recall(y, x)[::-1]


def test_a_shift_of_one_set_counts_squared():
    x = features(0)
    shift = features(1, num=1)[0]
    assert distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("cuts", [[200], [1, 2, 399]])
def test_sums_over_parts_are_those_of_the_whole(cuts):
    x = features(0)
    merged, *others = (FeatureSums.of(x[a:b]) for a, b in itertools.pairwise([0, *cuts, len(x)]))
    for part in others:
        merged = merged.merge(part)
    whole = FeatureSums.of(x)
    assert merged.num == whole.num == len(x)
    torch.testing.assert_close(merged.mean, x.mean(0))
    torch.testing.assert_close(merged.covariance, x.T.cov())
    assert frechet_distance(merged, whole) == pytest.approx(0, abs=1e-9)


def test_sums_of_float32_are_float64():
    assert {part.dtype for part in FeatureSums.of(features(0).float())} == {torch.float64}


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: distance(features(0, 1), features(1)), "features: expected at least 2 in a set; got 1"),
        (
            lambda: kernel_distance(features(0, 9), features(1), subset_size=10),
            "subset_size: expected 2 to 9, .* got 10",
        ),
        (lambda: kernel_distance(features(0), features(1), subset_size=1), "subset_size: expected 2 to 400, .* got 1"),
        (lambda: precision_recall(features(0, 3), features(1)), "expected more than 3 features in each; got 3 and 400"),
    ],
)
def test_sets_that_are_too_small_are_refused(score, message):
    with pytest.raises(ValueError, match=message):
        score()
