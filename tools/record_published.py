"""Record what the paper's code computes, for the tests: tests/support/published_cases.npz.

    python tools/record_published.py path/to/ml-tarflow

Takes a checkout of apple/ml-tarflow; the models, their weights and their inputs are those of
tests/support/published_cases.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import checkout
import published_cases as cases


@torch.no_grad()
def main(folder: Path) -> None:
    """Run every model forward, and backward under every guidance."""
    record = cases.inputs()
    x, latents, scored, drawn = map(torch.from_numpy, record.values())
    for name, arguments in cases.MODELS.items():
        model = checkout.load_code(folder).Model(**arguments)
        model.load_state_dict(cases.weights((key, tuple(value.shape)) for key, value in model.state_dict().items()))
        conditional = "num_classes" in arguments
        z, _, logdet = model(x, scored if conditional else None)
        record |= {f"{name}: z": z.numpy(), f"{name}: logdet": logdet.numpy()}
        for kind, guidance in cases.GUIDANCE[name].items():
            images = checkout.sample(model, latents.clone(), drawn if conditional else None, guidance)
            record[f"{name}: {kind}"] = images.numpy()
    np.savez_compressed(cases.RECORD, **record)
    print(f"{cases.RECORD.name}: {len(record)} arrays, {cases.RECORD.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
