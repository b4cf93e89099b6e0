"""Reference statistics, with which samples are compared: the features of a dataset, and files that hold them."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import datasets, processes
from .datasets import ImageDataset, ImageFolder
from .features import Extractor
from .files import atomic_write
from .scores import FeatureSums

__all__ = ["LEAST_IMAGES", "MOST_FEATURES", "Reference", "collect"]

LEAST_IMAGES = 4
"""The fewest images that every score can be computed of: precision looks at the three nearest neighbours of each."""

MOST_FEATURES = 10_000
"""The most images of a set whose features are kept, for the scores that need more than sums."""


@dataclass(frozen=True)
class Reference:
    """The features of a dataset: sums over all images, those of some in random order, and what they are features of.

    Args:
        sums: of all images.
        features: of at most ``MOST_FEATURES`` images, float32 ``(n, D)``.
        about: ``data`` (a sentence), ``digest`` (of the data), ``images`` (how many), ``transform``, ``extractor`` and
            ``extractor_digest``.
    """

    sums: FeatureSums
    features: Tensor
    about: dict[str, Any]

    @classmethod
    def of(
        cls, dataset: ImageDataset | ImageFolder, extractor: Extractor, flip: bool, batch_size: int = 64, seed: int = 0
    ) -> "Reference":
        """Compute the features of all images, where ``flip`` is set of half of them mirrored, as in training.

        Of several processes each reads its share of the images; all return the whole.

        Raises:
            ValueError: there are too few images.
        """
        if len(dataset) < 2 * LEAST_IMAGES:  # two disjoint sets of them are compared
            raise ValueError(f"dataset: expected at least {2 * LEAST_IMAGES} images; got {len(dataset)}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(dataset), generator=generator)
        mirrored = (torch.rand(len(dataset), 1, 1, 1, generator=generator) < 0.5) & flip
        own = slice(processes.rank(), None, processes.num_ranks())
        indices, chosen = (of_all.split(min(batch_size, len(order)))[own] for of_all in (order, mirrored))
        with contextlib.closing(datasets.read(dataset, indices, processes.num_readers())) as batches:
            pairs = zip(batches, chosen, strict=True)
            sums, features = collect(
                extractor(torch.where(flips, pixels.flip(-1), pixels)) for (pixels, _), flips in pairs
            )
        about = {
            "data": dataset.source,
            "digest": datasets.fingerprint(dataset)["digest"],
            "images": len(dataset),
            "transform": f"mirrored with probability 1/2, seed {seed}" if flip else "none",
            "extractor": extractor.name,
            "extractor_digest": extractor.digest,
        }
        return cls(sums, features, about)

    def save(self, path: Path) -> None:
        """Write a file of safetensors, in whose metadata ``about`` is."""
        data = save(self.sums._asdict() | {"features": self.features}, {"about": json.dumps(self.about)})
        with atomic_write(path) as beside:
            beside.write_bytes(data)

    @classmethod
    def load(cls, path: Path, extractor: Extractor) -> "Reference":
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, another file, or of another extractor.
        """
        if not path.is_file():
            raise FileNotFoundError(f"statistics: expected a file that tarflow statistics wrote; there is no {path}")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                sums = FeatureSums(*map(file.get_tensor, FeatureSums._fields))
                reference = cls(sums, file.get_tensor("features"), about)
            reference._check()
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            expected = "expected a file that tarflow statistics wrote"
            raise ValueError(f"statistics: {expected}; got {path}: {error}") from error
        if about["extractor_digest"] != extractor.digest:
            got = f"{about['extractor']} (weights {about['extractor_digest'][:8]})"
            raise ValueError(
                f"statistics: expected those of {extractor.name} (weights {extractor.digest[:8]}); got {path} of {got}"
            )
        return reference

    def _check(self) -> None:
        """Raise ValueError for tensors that are not what they should be; for ``about`` also TypeError or KeyError."""
        kinds = {"data": str, "digest": str, "images": int, "transform": str, "extractor": str, "extractor_digest": str}
        if any(not isinstance(self.about[name], kind) for name, kind in kinds.items()):
            raise ValueError(f"about: expected {', '.join(kinds)}")
        num, dim = self.features.shape
        shapes = [tuple(part.shape) for part in self.sums]
        if shapes != [(), (dim,), (dim, dim)] or num < 2 * LEAST_IMAGES or self.sums.num < num:
            raise ValueError(f"expected sums and features of one size; got {shapes} and {(num, dim)}")
        dtypes = [part.dtype for part in (*self.sums, self.features)]
        if dtypes != [torch.float64] * 3 + [torch.float32]:
            raise ValueError(f"expected sums in float64 and features in float32; got {dtypes}")
        if not all(part.isfinite().all() for part in (*self.sums, self.features)):
            raise ValueError("expected finite numbers; got nan or inf")


def collect(batches: Iterable[Tensor]) -> tuple[FeatureSums, Tensor]:
    """Sum over batches of features, at least one, and keep the features of the first ``MOST_FEATURES`` images.

    Of several processes each has every ``num_ranks()``-th batch from ``rank()`` on, if there are so many; all return
    the sums and the features of all batches.
    """
    sums, kept, num = None, [], 0
    with processes.together():
        for features in batches:
            part = FeatureSums.of(features)
            sums = part if sums is None else sums.merge(part)
            if num * processes.num_ranks() < MOST_FEATURES:
                kept.append(features)
            num += len(features)
    none = processes.of_main(lambda: kept[0][:0])
    sums = FeatureSums.of(none) if sums is None else sums
    total = FeatureSums(*map(processes.total, sums))
    return total, torch.cat(processes.in_turn(kept))[:MOST_FEATURES]
