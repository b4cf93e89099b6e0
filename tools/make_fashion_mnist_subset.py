"""Draw the Fashion-MNIST subset that ships with tarflow.

    python tools/make_fashion_mnist_subset.py [folder of the four IDX files]

Of each class, 1,000 images to train on and 100 to test on, all from the training split, so that results on the
subset say nothing about the original test split, which stays unseen.
"""

import sys
from pathlib import Path

import numpy as np

import tarflow
from tarflow import datasets

TRAIN_PER_CLASS, TEST_PER_CLASS = 1000, 100
TARGET = Path(tarflow.__file__).parent / "data" / "fashion_mnist_subset.npz"


def main(data_dir: Path = datasets.DEBIAN_FASHION_MNIST) -> None:
    """Write the subset, with the indices of its images in the training split."""
    full = datasets.load("fashion-mnist", "train", data_dir)
    images, labels = full.images[:, 0].numpy(), full.labels.numpy().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(full))
    per_class = [order[labels[order] == label] for label in range(full.num_classes)]
    train = np.sort(np.concatenate([indices[:TRAIN_PER_CLASS] for indices in per_class]))
    rest = [indices[TRAIN_PER_CLASS : TRAIN_PER_CLASS + TEST_PER_CLASS] for indices in per_class]
    test = np.sort(np.concatenate(rest))
    arrays = {
        f"{split}_{kind}": values[indices]
        for split, indices in (("train", train), ("test", test))
        for kind, values in (("images", images), ("labels", labels), ("indices", np.arange(len(full), dtype=np.uint16)))
    }
    np.savez_compressed(TARGET, **arrays)
    print(f"{TARGET.name}: {len(train):,} + {len(test):,} images, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
