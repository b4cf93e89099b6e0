"""Record what the published code computes, for the tests: tests/support/published_{cases,itarflow,starflow}.npz.

    python tools/record_published.py path/to/ml-tarflow path/to/ml-itarflow path/to/ml-starflow

Takes checkouts of apple/ml-tarflow, apple/ml-itarflow and apple/ml-starflow, which needs einops; the models, their
weights and their inputs are those of tests/support/published_cases.py.
"""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import checkout
import published_cases as cases


@torch.no_grad()
def record_tarflow(folder: Path) -> dict[str, np.ndarray]:
    """Run every TarFlow forward, and backward under every guidance."""
    record = cases.inputs()
    x, latents, scored, drawn = map(torch.from_numpy, record.values())
    for name, arguments in cases.MODELS.items():
        model = build(folder, arguments, cases.weights)
        conditional = "num_classes" in arguments
        z, _, logdet = model(x, scored if conditional else None)
        record |= {f"{name}: z": z.numpy(), f"{name}: logdet": logdet.numpy()}
        for kind, guidance in cases.GUIDANCE[name].items():
            images = checkout.sample(model, latents.clone(), drawn if conditional else None, guidance)
            record[f"{name}: {kind}"] = images.numpy()
    return record


def record_itarflow(folder: Path) -> dict[str, np.ndarray]:
    """Run every iTarFlow forward, backward under every guidance, and along falling levels of noise."""
    record = cases.inputs()
    x, latents, scored, drawn = map(torch.from_numpy, record.values())
    t = torch.from_numpy(cases.noise_levels())[:, None]
    for name, arguments in cases.ITARFLOWS.items():
        model = build(folder, arguments, cases.itarflow_weights).requires_grad_(False)
        conditional = "num_classes" in arguments
        z, _, logdet, _ = model(x, scored if conditional else None, t)
        record |= {f"{name}: z": z.numpy(), f"{name}: logdet": logdet.numpy()}
        labels = drawn if conditional else None
        for kind, guidance in cases.ITARFLOW_GUIDANCE[name].items():
            options = guidance and {
                "guidance": guidance.weight,
                "attn_temp": guidance.temperature,
                "annealed_guidance": guidance.schedule == "linear",
                "guide_flows": guidance.blocks or -1,
                "lerp_style": "starflow" if guidance.rule == "gaussian" else "tarflow",
            }
            # One image at a time: of a batch, the published rule "starflow" guides mu of all by sigma of the first.
            drawn_alone = [
                model.reverse(latents[[b]], None if labels is None else labels[[b]], t=t[[b]], **(options or {}))
                for b in range(cases.BATCH)
            ]
            record[f"{name}: {kind}"] = torch.cat(drawn_alone).numpy()
        for kind, denoising in cases.DENOISING.items():
            record[f"{name}: {kind}"] = denoise(folder, model, cases.NOISY * x, labels, denoising).numpy()
    return record


@torch.no_grad()
def record_starflow(folder: Path) -> dict[str, np.ndarray]:
    """Run every STARFlow forward, and backward with and without guidance."""
    record = cases.starflow_inputs()
    sys.path.insert(0, str(folder))  # for its package ``misc``
    code = checkout.load_code(folder)
    for name, arguments in cases.STARFLOWS.items():
        model = build(folder, arguments, cases.weights)
        x, latents = (torch.from_numpy(record[f"{name}: {part}"]) for part in ("x", "latents"))
        text, empty = (torch.from_numpy(record[part]) for part in ("text", "empty text"))
        conditional = "txt_dim" in arguments
        z, _, _, logdets = model(x, text if conditional else None)
        record |= {f"{name}: z": z.numpy(), f"{name}: logdet": sum(part.flatten(1).sum(1) for part in logdets).numpy()}
        for kind, guidance in cases.STARFLOW_GUIDANCE[name].items():
            texts = text if guidance is None else torch.cat((text, empty.expand_as(text)))
            caches = [code.KVCache() for _ in model.blocks]
            images = model(
                latents.clone(),
                texts if conditional else None,
                reverse=True,
                kv_caches=caches,
                guidance=guidance.weight if guidance else 0,
            )
            record[f"{name}: {kind}"] = images.numpy()
    return record


def build(folder: Path, arguments: dict, make_weights: Callable[..., dict[str, Tensor]]) -> torch.nn.Module:
    """Build a published model with the weights of the tests."""
    model = checkout.load_code(folder).Model(**arguments)
    model.load_state_dict(make_weights((key, tuple(value.shape)) for key, value in model.state_dict().items()))
    return model


def denoise(
    folder: Path, model: torch.nn.Module, x: Tensor, labels: Tensor | None, denoising: cases.Denoising
) -> Tensor:
    """Run the published denoising, a part of a program for GPUs, on the CPU."""
    wanted = "self_denoising", "iterative_denoising"
    program = ast.parse((folder / "evaluate_fid.py").read_text())
    functions = [node for node in program.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    names = {"torch": torch}
    exec(compile(ast.Module(functions, []), "evaluate_fid.py", "exec"), names)
    sizes = {"sample_batch_size": len(x), "denoising_batch_size": len(x), "img_size": x.shape[2], "channel_size": 3}
    arguments, alone = SimpleNamespace(**sizes, clip=denoising.clip, dyn="ode"), SimpleNamespace(world_size=1)
    least, largest = cases.LEVELS
    with patch.object(Tensor, "cuda", lambda self: self):
        return names["iterative_denoising"](
            model, labels, x, arguments, alone, t0=least, t1=largest, steps=denoising.steps
        )


def main(tarflow: Path, itarflow: Path, starflow: Path) -> None:
    """Write the records."""
    for path, record in (
        (cases.RECORD, record_tarflow(tarflow)),
        (cases.ITARFLOW_RECORD, record_itarflow(itarflow)),
        (cases.STARFLOW_RECORD, record_starflow(starflow)),
    ):
        np.savez_compressed(path, **record)
        print(f"{path.name}: {len(record)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
