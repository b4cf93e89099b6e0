"""What is recorded of the published code: models whose weights come from a seed, and the guidance of each inverse.

``tools/record_published.py`` runs these through checkouts of it, TarFlow's into ``published_cases.npz``, iTarFlow's
into ``published_itarflow.npz`` and STARFlow's into ``published_starflow.npz``, which the tests read.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tarflow import Denoising, Guidance

RECORD = Path(__file__).with_suffix(".npz")
ITARFLOW_RECORD = Path(__file__).with_name("published_itarflow.npz")
STARFLOW_RECORD = Path(__file__).with_name("published_starflow.npz")
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

# The same of iTarFlow. Its sizes are lists, of one for all blocks or of one for each.
LEVELS = 0.05, 0.3
NOISY = 1.5  # times x, what is denoised
SMALL_ITARFLOW = {"in_channels": 3, "img_size": 6, "patch_sizes": [2], "channels": [128], "num_blocks": 3}
ITARFLOWS = {
    "classes": SMALL_ITARFLOW | {"layers_per_block": [1, 1, 3], "num_classes": CLASSES},
    "unconditional": SMALL_ITARFLOW | {"channels": [64, 128, 64], "layers_per_block": [1]},
    "volume preserving": SMALL_ITARFLOW | {"layers_per_block": [1], "num_classes": CLASSES, "nvp": False},
}
ITARFLOW_GUIDANCE = {
    "classes": {
        "none": None,
        "linear": Guidance(2.0),
        "constant": Guidance(0.5, "constant"),
        "temperature": Guidance(1.0, temperature=0.5),
        "one block": Guidance(2.0, blocks=1),
        "two blocks": Guidance(2.0, blocks=2),
        "gaussian": Guidance(2.0, rule="gaussian", blocks=1),
        "gaussian, constant": Guidance(1.0, "constant", rule="gaussian", blocks=1),
    },
    "unconditional": {"none": None, "temperature": Guidance(1.5, temperature=0.4)},
    "volume preserving": {"none": None, "linear": Guidance(2.0)},
}
DENOISING = {
    "ten steps": Denoising(10),
    "one step": Denoising(1),
    "clipped": Denoising(4, clip=True),
}


# The same of STARFlow.
TEXT, TEXT_DIM = 6, 10
SMALL_STARFLOW = {
    "in_channels": 4,
    "img_size": 4,
    "patch_size": 1,
    "channels": 128,
    "num_blocks": 3,
    "layers_per_block": [1, 1, 2],
    "rope": True,
    "sos": True,
    "use_softplus": True,
    "use_final_norm": True,
    "soft_clip": 4,
    "seq_order": "L2R",
}
STARFLOWS = {
    "text": SMALL_STARFLOW | {"txt_size": TEXT, "txt_dim": TEXT_DIM, "cond_top_only": True},
    "no text": SMALL_STARFLOW | {"num_blocks": 2, "layers_per_block": [1, 2]},
    "patches": SMALL_STARFLOW | {"in_channels": 3, "patch_size": 2, "num_blocks": 2, "layers_per_block": [1, 2]},
}
STARFLOW_GUIDANCE = {
    "text": {"none": None, "gaussian": Guidance(2.5, "constant", rule="gaussian")},
    "no text": {"none": None},
    "patches": {"none": None},
}


def noise_levels() -> np.ndarray:
    """One level for each image of a batch."""
    return np.array([0.05, 0.11, 0.3], dtype=np.float32)


def inputs() -> dict[str, np.ndarray]:
    """Images ``x``, ``latents`` of unit variance, and labels of both; -1 is a dropped label, which is scored alone."""
    random = np.random.RandomState(1)
    return {
        "x": random.uniform(-1, 1, (BATCH, 3, 6, 6)).astype(np.float32),
        "latents": random.uniform(-(3**0.5), 3**0.5, (BATCH, 9, 12)).astype(np.float32),
        "scored": np.array([4, -1, 0]),
        "drawn": np.array([4, 1, 0]),
    }


def starflow_inputs() -> dict[str, np.ndarray]:
    """Images ``x``, ``latents`` of the same shape, which the code for STARFlow has, and embeddings of texts."""
    random, record = np.random.RandomState(2), {}
    for name, arguments in STARFLOWS.items():
        shape = BATCH, arguments["in_channels"], arguments["img_size"], arguments["img_size"]
        record[f"{name}: x"] = random.uniform(-1, 1, shape).astype(np.float32)
        record[f"{name}: latents"] = random.uniform(-(3**0.5), 3**0.5, shape).astype(np.float32)
    return record | {
        "text": random.uniform(-1, 1, (BATCH, TEXT, TEXT_DIM)).astype(np.float32),
        "empty text": random.uniform(-1, 1, (1, TEXT, TEXT_DIM)).astype(np.float32),
    }


def itarflow_weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Weights of an iTarFlow, with a prior of variance 1 as trained ones have, which published denoising assumes."""
    state = weights(shapes)
    return state | {"var": torch.ones_like(state["var"])}


def weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Weights for the published names, as if trained; NumPy's old generator gives the same numbers for ever."""
    random, state = np.random.RandomState(0), {}
    for name, shape in sorted(shapes):
        noise = torch.tensor(random.uniform(-1, 1, shape), dtype=torch.float32)
        if name.endswith(("attn_mask", "freqs_cos", "freqs_sin")):
            state[name] = torch.ones(shape).tril()
        elif name == "var":
            state[name] = noise.exp()
        elif name.endswith("final_norm.weight"):
            state[name] = 0.3 * noise
        elif name.endswith("norm.weight"):
            state[name] = 1 + 0.3 * noise
        elif name.endswith("embed"):
            state[name] = noise
        else:
            state[name] = noise * (0.1 if "proj_out" in name else 1.0) * (3 / shape[-1]) ** 0.5
    return state
