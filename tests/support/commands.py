"""Commands called as a user calls them: runs of a few steps, samples, and a look at what was written."""

import numpy as np
from PIL import Image

from tarflow import TarFlow, cli

TINY = "--patch-size=7 --channels=64 --num-blocks=2 --layers-per-block=1"
DATASET_NAMES = [
    f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]


def main(*arguments):
    """Call a command and return its exit status."""
    return cli.main([str(argument) for argument in arguments])


def train(out, *flags, steps, shape=TINY):
    """Train a small model for a few steps, and return the folder of its run."""
    # Steps large enough that even so few of them tell labels, guidance and noise apart.
    fast = ("--learning-rate=0.003", "--warmup-steps=1", f"--max-steps={steps}", "--log-every=1")
    assert main("train", *shape.split(), *fast, "--batch-size=16", "--device=cpu", *flags, f"--out={out}") == 0
    return out


def is_picture(path):
    """Whether a file is an image of more than a few pixels and colours."""
    with Image.open(path) as image:
        return min(image.size) > 100 and len(image.getcolors(2**24)) > 10


def arrays(run, path, *flags):
    """Draw twelve samples, and return the arrays of the file that they are written to."""
    assert main("sample", run, "--num=12", f"--out={path}", *flags) == 0
    with np.load(path) as file:
        return dict(file)


def change_samples(monkeypatch, change):
    """Change, in place, the images that a TarFlow draws from now on."""
    sample = TarFlow.sample

    def changed(*arguments, **options):
        drawn = sample(*arguments, **options)
        change(drawn[0] if isinstance(drawn, tuple) else drawn)
        return drawn

    monkeypatch.setattr(TarFlow, "sample", changed)
