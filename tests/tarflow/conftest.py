"""Runs and folders of pictures that several test files share: each is made once, and no test writes to it."""

import numpy as np
import pytest
from PIL import Image

from commands import train
from tarflow import datasets


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Eight steps of the default recipe: conditional Fashion-MNIST with Gaussian noise."""
    out = tmp_path_factory.mktemp("cli") / "run"
    return train(out, "--evaluate-every=4", "--sample-every=4", "--checkpoint-every=3", "--keep-checkpoints=2", steps=8)


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory):
    """A model without classes."""
    return train(tmp_path_factory.mktemp("cli") / "unconditional", "--no-conditional", "--sigma=0.2", steps=4)


@pytest.fixture(scope="session")
def likelihood(tmp_path_factory):
    """A model for likelihoods: with uniform noise."""
    return train(tmp_path_factory.mktemp("cli") / "likelihood", "--noise=uniform", "--guidance=0", steps=4)


@pytest.fixture(scope="session")
def flowpp(tmp_path_factory):
    """A Flow++, which ends with its score."""
    small = "--model=flowpp --filters=8 --blocks-per-coupling=1 --importance-samples=2"
    return train(tmp_path_factory.mktemp("cli") / "flowpp", "--stack=squeeze channel2", steps=3, shape=small)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folders of pictures, with an image in one of them that is none, and ImageNet's of 2016, without labels."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(64):
        for parent in (f"good/{'ab'[number % 2]}", f"bad/{'ab'[number % 2]}", "train_32x32", "valid_32x32"):
            (folder / parent).mkdir(parents=True, exist_ok=True)
            width = 32 if "_32x32" in parent else 8 + number
            pixels = np.random.default_rng(number).integers(0, 256, (32, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / parent / f"{number}.png")
    for path in datasets.load("folder", "train", folder / "bad", 8).paths[:17]:
        path.write_bytes(b"no picture")
    return folder
