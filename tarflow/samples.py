"""Scores of samples: how they look beside real images, by the features of a network.

Samples are drawn by a *protocol*, without which no score of them can be compared:

    tarflow     that of the published TarFlow: labels drawn uniformly, samples truncated to 8 bits
    balanced    labels in turn, so that classes are equally frequent, samples rounded to 8 bits

A distance stands between its floor, that of two disjoint sets of real images, and its ceiling, that of uniform noise.
Its bias falls as 1/n, so that only distances of one n are comparable.

Of several processes each draws its share of the samples and computes the features of these; all return the scores of
all samples, which are the same for any number of processes, up to the order of sums.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Generator, Tensor

from . import processes
from .features import Extractor
from .noise import Quantization, derive_seed, to_pixels
from .reference import Reference, collect
from .scores import FeatureSums, frechet_distance, kernel_distance, precision_recall
from .validation import not_finite

__all__ = ["LABELS", "QUANTIZATION", "Protocol", "Sampler", "distance_range", "draw_labels", "score_samples"]

Protocol = Literal["tarflow", "balanced"]

LABELS: dict[Protocol, str] = {"tarflow": "drawn uniformly", "balanced": "in turn"}
"""How the labels of each protocol are chosen, see :func:`draw_labels`."""

QUANTIZATION: dict[Protocol, Quantization] = {"tarflow": "truncate", "balanced": "round"}
"""How samples become 8-bit pixels in each protocol, see :func:`tarflow.noise.to_pixels`."""

MOST_REDRAWS = 10
SUBSETS, SUBSET_SIZE = 100, 1000


def draw_labels(protocol: Protocol, num: int, num_classes: int, seed: int = 0) -> Tensor | None:
    """Return the labels of a protocol, int64 ``(num,)``; None for a model without classes."""
    if not num_classes:
        return None
    if protocol == "balanced":
        return torch.arange(num) % num_classes
    return torch.randint(num_classes, (num,), generator=Generator().manual_seed(seed))


@dataclass
class Sampler:
    """A source of 8-bit samples: one that is not finite is counted, and another drawn in its place, of the same label.

    Args:
        draw: number and labels to samples, float ``(B, C, H, W)``, of the next numbers of the generator.
        quantization: how they become 8-bit pixels.
        generator: the source of randomness of ``draw``; its seed for a batch depends on (seed, number of the batch).
        seed: seed of all samples.
        not_finite: how many have held a nan or an infinity so far, in this process.
    """

    draw: Callable[[int, Tensor | None], Tensor]
    quantization: Quantization
    generator: Generator
    seed: int = 0
    not_finite: int = 0

    def batches(self, num: int, labels: Tensor | None, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Draw samples of labels ``(num,)``, or of none: uint8 ``(B, C, H, W)``, and the labels ``(B,)`` of each batch.

        Of several processes, each draws every ``num_ranks()``-th batch from ``rank()`` on.

        Raises:
            ValueError: a sample is not finite after being drawn anew ten times.
        """
        batches = enumerate(torch.arange(num).split(batch_size))
        for number, places in islice(batches, processes.rank(), None, processes.num_ranks()):
            self.generator.manual_seed(derive_seed(self.seed, number))
            part = None if labels is None else labels[places]
            yield self._draw_finite(len(places), part), part

    def _draw_finite(self, num: int, labels: Tensor | None) -> Tensor:
        images = self.draw(num, labels)
        bad = not_finite(images)
        self.not_finite += len(bad)
        for _ in range(MOST_REDRAWS):
            if not len(bad):
                break
            others = self.draw(len(bad), None if labels is None else labels[bad])
            images[bad] = others
            bad = bad[not_finite(others)]
            self.not_finite += len(bad)
        if len(bad):
            raise ValueError(f"{len(bad)} of {num} samples are not finite after being drawn anew {MOST_REDRAWS} times")
        return to_pixels(images, self.quantization)


def score_samples(
    batches: Iterable[tuple[Tensor, Tensor | None]], extractor: Extractor, reference: Reference, seed: int = 0
) -> dict[str, float]:
    """Compare samples with real images: all scores of :mod:`tarflow.scores`, and whether classes are recognised.

    Args:
        batches: 8-bit samples, uint8 ``(B, C, H, W)``, at least ``LEAST_IMAGES`` in all, each batch with its classes,
            int64 ``(B,)``, or None; of several processes, as :meth:`Sampler.batches` shares them out.
        extractor: the network by whose features they are compared.
        reference: statistics of real images by the same network.
        seed: seed of the subsets and the noise of the scores.

    Returns:
        the scores by their names, which say of how many images each is.
    """
    recognised: list[Tensor] = []

    def features_of_batches() -> Iterator[Tensor]:
        for pixels, labels in batches:
            features = extractor(pixels)
            if extractor.classify is not None and labels is not None:
                recognised.append(extractor.classify(features) == labels)
            yield features

    sums, features = collect(features_of_batches())
    hits = processes.in_turn(recognised)

    def compare() -> dict[str, float]:
        scores = {extractor.frechet_name: frechet_distance(sums, reference.sums)}
        scores |= _kept_scores(features, reference.features, extractor, Generator().manual_seed(seed))
        if hits:
            scores["recognised as their class"] = torch.cat(hits).double().mean().item()
        return scores

    return processes.of_main(compare)


def distance_range(
    num: int, image_shape: tuple[int, ...], extractor: Extractor, reference: Reference, seed: int = 0
) -> dict[str, float]:
    """Return the floor and the ceiling of the Frechet distance of ``num`` images, or of as many as the reference has.

    The floor is the distance between two disjoint sets of real images, the ceiling that of uniform noise from all.
    """
    num = min(num, len(reference.features) // 2)
    halves = (FeatureSums.of(half) for half in reference.features[: 2 * num].split(num))
    generator = Generator().manual_seed(seed)
    noise = (
        torch.randint(0, 256, (len(part), *image_shape), dtype=torch.uint8, generator=generator)
        for part in torch.arange(num).split(64)
    )
    sums, _ = collect(map(extractor, islice(noise, processes.rank(), None, processes.num_ranks())))

    def compare() -> dict[str, float]:
        return {
            f"floor: the distance between two disjoint sets of {num:,} real images": frechet_distance(*halves),
            f"ceiling: the distance of {num:,} images of uniform noise": frechet_distance(sums, reference.sums),
        }

    return processes.of_main(compare)


def _kept_scores(samples: Tensor, real: Tensor, extractor: Extractor, generator: Generator) -> dict[str, float]:
    """Return the scores that need single features; precision and recall are of equally many samples and real images."""
    num = min(len(samples), len(real))
    size = min(SUBSET_SIZE, num // 2)
    mean, deviation = kernel_distance(samples, real, SUBSETS, size, generator)
    precision, recall = precision_recall(real[:num], samples[:num])
    name = f"{extractor.kernel_name}, {SUBSETS} subsets of {size:,}"
    return {
        f"{name}: mean": mean,
        f"{name}: standard deviation": deviation,
        f"precision of {num:,} samples": precision,
        f"recall of {num:,} real images": recall,
    }
