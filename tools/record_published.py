"""Record what the paper's code computes, for the tests: tests/support/published_cases.npz.

    python tools/record_published.py path/to/ml-tarflow

Takes a checkout of apple/ml-tarflow; the models, their weights and their inputs are those of
tests/support/published_cases.py.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import published_cases as cases
from tarflow import Guidance

GUIDED = {"both": "ab", "alpha": "a", "mu": "b"}


@torch.no_grad()
def main(checkout: Path) -> None:
    """Forward and inverses of every model."""
    spec = importlib.util.spec_from_file_location("transformer_flow", checkout / "transformer_flow.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    record = cases.inputs()
    x, latents, scored, drawn = map(torch.from_numpy, record.values())
    for name, arguments in cases.MODELS.items():
        model = code.Model(**arguments)
        model.load_state_dict(cases.weights((key, tuple(value.shape)) for key, value in model.state_dict().items()))
        conditional = "num_classes" in arguments
        z, _, logdet = model(x, scored if conditional else None)
        record |= {f"{name}: z": z.numpy(), f"{name}: logdet": logdet.numpy()}
        for kind, guidance in cases.GUIDANCE[name].items():
            images = model.reverse(latents.clone(), drawn if conditional else None, **published(guidance))
            record[f"{name}: {kind}"] = images.numpy()
    np.savez_compressed(cases.RECORD, **record)
    print(f"{cases.RECORD.name}: {len(record)} arrays, {cases.RECORD.stat().st_size:,} bytes")


def published(guidance: Guidance | None) -> dict[str, float | str | bool]:
    """Guidance as the published code is asked for it; its reference branch has no label, whatever else it has."""
    if guidance is None:
        return {}
    return {
        "guidance": guidance.weight,
        "guide_what": GUIDED[guidance.parameters],
        "attn_temp": guidance.temperature,
        "annealed_guidance": guidance.schedule == "linear",
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
