"""Train small models on the full Fashion-MNIST and score them: four flows, two kinds of dequantization, ablations.

    python studies/fashion_mnist.py NAME ...    train and score these rows; all of them without a name
    python studies/report.py                    write the tables of docs/flowpp.md and docs/study.png from results/

All rows see the same images in the same order, unconditionally, without augmentation, for the same number of steps with
the same optimizer, at about 770,000 parameters, but for two of half the width; ``ROWS`` says in what they differ.
Bits/dim are those of 1,000 of the 10,000 test images, over all 784 dimensions, under the dequantization of training. A
training that was interrupted goes on.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from samples import trained
from tarflow import DequantizerConfig, FlowPPConfig, Guidance, ImageFlow, TarFlowConfig, datasets
from tarflow.evaluation import Estimate, dequantized_bits_per_dim
from tarflow.files import atomic_write
from tarflow.hardware import keep_freed_memory
from tarflow.training.config import DataConfig, TrainConfig, TrainingConfig

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
NUM_IMAGES, NUM_SAMPLES = 1000, 8

DATA = DataConfig(conditional=False)
TRAINING = TrainingConfig(
    noise="variational",
    label_drop=0.0,
    max_steps=1000,
    batch_size=16,
    learning_rate=2e-3,
    guidance=Guidance(0.0),
    importance_samples=0,
    evaluate_every=10**9,
    sample_every=10**9,
    calibrate=False,
)
FLOWPP = FlowPPConfig(stack="squeeze stripe4 channel4", filters=32)
HALF = replace(FLOWPP, filters=16)
REALNVP = replace(FLOWPP, coupling="affine", attention="none", filters=40)
TARFLOW = TarFlowConfig(patch_size=2, channels=80, head_dim=40, num_blocks=4, layers_per_block=2)
MIXTURE = replace(TARFLOW, coupling="mixture")


@dataclass(frozen=True)
class Row:
    """A model of the study: its title, its settings, and the noise of its training."""

    title: str
    model: TarFlowConfig | FlowPPConfig
    noise: Literal["uniform", "variational"] = "variational"


ROWS = {
    "realnvp-uniform": Row("RealNVP-style affine", replace(REALNVP, filters=44), "uniform"),
    "realnvp-variational": Row("RealNVP-style affine", REALNVP),
    "flowpp-uniform": Row("Flow++", replace(FLOWPP, filters=36), "uniform"),
    "flowpp-variational": Row("Flow++", FLOWPP),
    "tarflow-uniform": Row("TarFlow, affine", replace(TARFLOW, channels=84, head_dim=42), "uniform"),
    "tarflow-variational": Row("TarFlow, affine", TARFLOW),
    "tarflow-mixture-uniform": Row("TarFlow, mixture", replace(MIXTURE, channels=82, head_dim=41), "uniform"),
    "tarflow-mixture-variational": Row("TarFlow, mixture", replace(MIXTURE, channels=78, head_dim=39)),
    "flowpp-affine": Row(
        "Flow++ with affine couplings",
        replace(FLOWPP, coupling="affine", filters=40, dequantizer=DequantizerConfig(coupling="affine")),
    ),
    "flowpp-without-attention": Row("Flow++ without attention", replace(FLOWPP, attention="max")),
    "flowpp-half": Row("Flow++ of half width", HALF),
    "flowpp-half-without-attention": Row("Half width, no attention", replace(HALF, attention="max")),
}


def run(name: str, steps: int, seed: int, out: Path) -> None:
    """Train a row, score it, and write the result to ``results/``."""
    row = ROWS[name]
    config = TrainConfig(DATA, row.model, replace(TRAINING, noise=row.noise, max_steps=steps, seed=seed))
    folder = out / f"{name}-{steps}-{seed}"
    begun, began = folder.exists(), time.perf_counter()
    model = trained(config, folder)
    seconds = time.perf_counter() - began
    test = datasets.load(DATA.dataset, "test", DATA.data_dir)
    pixels, _ = test.get_batch(datasets.evenly_spaced(len(test), NUM_IMAGES))
    one_sample, weighted = dequantized_bits_per_dim(model, pixels, num_samples=NUM_SAMPLES, generator=_generator(seed))
    result = {
        "name": name,
        "seed": seed,
        "data": test.source,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": None if begun else seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "draws": NUM_SAMPLES,
        "one_sample": [round(value, 5) for value in one_sample.tolist()],
        "weighted": [round(value, 5) for value in weighted.tolist()],
        "round_trip": round_trip(model, pixels[:64], seed),
        "config": asdict(config),
    }
    RESULTS.mkdir(exist_ok=True)
    with atomic_write(RESULTS / f"{folder.name}.json") as path:
        path.write_text(json.dumps(result, default=str) + "\n")
    print(f"{name}: {Estimate.of(one_sample)} by one sample, {Estimate.of(weighted)} by {NUM_SAMPLES}", flush=True)


@torch.no_grad()
def round_trip(model: ImageFlow, pixels: torch.Tensor, seed: int) -> dict[str, float]:
    """Map images to latents and back in float32; return how far values are off, in steps of 8-bit pixels."""
    x, _ = model.dequantize(pixels, _generator(seed))
    z, _ = model(x)
    steps = ((model.inverse(z) - x) * 128).abs()
    return {"max": steps.max().item(), "rms": steps.square().mean().sqrt().item()}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def main() -> None:
    """Run the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*ROWS, []], metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=TRAINING.max_steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    command = parser.parse_args()
    keep_freed_memory()
    for name in command.names or ROWS:
        run(name, command.steps, command.seed, command.out)


if __name__ == "__main__":
    main()
