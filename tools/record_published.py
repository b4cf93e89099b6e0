"""Record what the published code computes, for the tests: tests/support/published_{cases,itarflow,starflow}.npz.

    python tools/record_published.py path/to/ml-tarflow path/to/ml-itarflow path/to/ml-starflow

Takes checkouts of apple/ml-tarflow, apple/ml-itarflow and apple/ml-starflow, which needs einops; the models, their
weights and their inputs are those of tests/support/published_cases.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import checkout
import published_cases as cases


@torch.no_grad()
def record_tarflow() -> dict[str, np.ndarray]:
    """Run every TarFlow forward, and backward under every guidance."""
    record = cases.inputs()
    x, latents, scored, drawn = map(torch.from_numpy, record.values())
    for name, arguments in cases.MODELS.items():
        model = build(checkout.TARFLOW, arguments, cases.weights)
        conditional = "num_classes" in arguments
        z, _, logdet = model(x, scored if conditional else None)
        record |= {f"{name}: z": z.numpy(), f"{name}: logdet": logdet.numpy()}
        for kind, guidance in cases.GUIDANCE[name].items():
            images = checkout.sample(model, latents.clone(), drawn if conditional else None, guidance)
            record[f"{name}: {kind}"] = images.numpy()
    return record


def record_itarflow() -> dict[str, np.ndarray]:
    """Run every iTarFlow forward, backward under every guidance, and along falling levels of noise."""
    record = cases.inputs()
    x, latents, scored, drawn = map(torch.from_numpy, record.values())
    t = torch.from_numpy(cases.noise_levels())[:, None]
    for name, arguments in cases.ITARFLOWS.items():
        model = build(checkout.ITARFLOW, arguments, cases.itarflow_weights).requires_grad_(False)
        conditional = "num_classes" in arguments
        z, _, logdet, _ = model(x, scored if conditional else None, t)
        record |= {f"{name}: z": z.numpy(), f"{name}: logdet": logdet.numpy()}
        labels = drawn if conditional else None
        for kind, guidance in cases.ITARFLOW_GUIDANCE[name].items():
            # One image at a time: of a batch, the published rule "starflow" guides mu of all by sigma of the first.
            drawn_alone = [
                checkout.sample(
                    model, latents[[b]], None if labels is None else labels[[b]], guidance, cases.noise_levels()[b]
                )
                for b in range(cases.BATCH)
            ]
            record[f"{name}: {kind}"] = torch.cat(drawn_alone).numpy()
        for kind, denoising in cases.DENOISING.items():
            levels = denoising.levels(*reversed(cases.LEVELS))
            images = checkout.remove_noise(model, cases.NOISY * x, labels, levels, denoising.clip)
            record[f"{name}: {kind}"] = images.numpy()
    return record


@torch.no_grad()
def record_starflow() -> dict[str, np.ndarray]:
    """Run every STARFlow forward, and backward with and without guidance."""
    record = cases.starflow_inputs()
    for name, arguments in cases.STARFLOWS.items():
        model = build(checkout.STARFLOW, arguments, cases.weights)
        x, latents = (torch.from_numpy(record[f"{name}: {part}"]) for part in ("x", "latents"))
        text, empty = (torch.from_numpy(record[part]) for part in ("text", "empty text"))
        texts = text if "txt_dim" in arguments else None
        z, _, _, logdets = model(x, texts)
        record |= {f"{name}: z": z.numpy(), f"{name}: logdet": sum(part.flatten(1).sum(1) for part in logdets).numpy()}
        for kind, guidance in cases.STARFLOW_GUIDANCE[name].items():
            record[f"{name}: {kind}"] = checkout.sample_starflow(model, latents, texts, guidance, empty).numpy()
    return record


def build(code: checkout.Code, arguments: dict, make_weights: Callable[..., dict[str, Tensor]]) -> torch.nn.Module:
    """Build a published model with the weights of the tests."""
    model = code.load().Model(**arguments)
    model.load_state_dict(make_weights((key, tuple(value.shape)) for key, value in model.state_dict().items()))
    return model


def main(tarflow: Path, itarflow: Path, starflow: Path) -> None:
    """Write the records."""
    checkout.TARFLOW.use(tarflow)
    checkout.ITARFLOW.use(itarflow)
    checkout.STARFLOW.use(starflow)
    for path, record in (
        (cases.RECORD, record_tarflow()),
        (cases.ITARFLOW_RECORD, record_itarflow()),
        (cases.STARFLOW_RECORD, record_starflow()),
    ):
        np.savez_compressed(path, **record)
        print(f"{path.name}: {len(record)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
