"""What is recorded of the published code: models whose weights come from a seed, and the guidance of each inverse.

``tools/record_published.py`` runs these through a checkout of it into ``published_cases.npz``, which the tests read.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tarflow import Guidance

RECORD = Path(__file__).with_suffix(".npz")
CLASSES, BATCH = 5, 3

# By the arguments of the published model.
SMALL = {"in_channels": 3, "img_size": 6, "patch_size": 2, "channels": 128, "num_blocks": 3, "layers_per_block": 2}
MODELS = {
    "classes": SMALL | {"num_classes": CLASSES},
    "unconditional": SMALL | {"num_blocks": 2},
    "volume preserving": SMALL | {"num_classes": CLASSES, "nvp": False, "channels": 64},
}
GUIDANCE = {
    "classes": {
        "none": None,
        "linear": Guidance(2.0),
        "constant": Guidance(1.0, "constant"),
        "alpha": Guidance(2.0, parameters="alpha"),
        "mu": Guidance(2.0, parameters="mu"),
        "temperature": Guidance(1.5, temperature=0.5),
    },
    "unconditional": {
        "none": None,
        "linear": Guidance(2.0, temperature=0.4),
        "constant": Guidance(1.0, "constant", temperature=2.5),
        "alpha": Guidance(2.0, parameters="alpha", temperature=0.4),
        "mu": Guidance(2.0, parameters="mu", temperature=0.4),
    },
    "volume preserving": {"none": None, "linear": Guidance(2.0)},
}


def inputs() -> dict[str, np.ndarray]:
    """Images ``x``, ``latents`` of unit variance, and labels of both; -1 is a dropped label, which is scored alone."""
    random = np.random.RandomState(1)
    return {
        "x": random.uniform(-1, 1, (BATCH, 3, 6, 6)).astype(np.float32),
        "latents": random.uniform(-(3**0.5), 3**0.5, (BATCH, 9, 12)).astype(np.float32),
        "scored": np.array([4, -1, 0]),
        "drawn": np.array([4, 1, 0]),
    }


def weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Weights for the published names, as if trained; NumPy's old generator gives the same numbers for ever."""
    random, state = np.random.RandomState(0), {}
    for name, shape in sorted(shapes):
        noise = torch.tensor(random.uniform(-1, 1, shape), dtype=torch.float32)
        if name.endswith("attn_mask"):
            state[name] = torch.ones(shape).tril()
        elif name == "var":
            state[name] = noise.exp()
        elif name.endswith("norm.weight"):
            state[name] = 1 + 0.3 * noise
        elif name.endswith("embed"):
            state[name] = noise
        else:
            state[name] = noise * (0.1 if "proj_out" in name else 1.0) * (3 / shape[-1]) ** 0.5
    return state
