"""Measure against a checkout of the paper's code (apple/ml-tarflow), side by side in one process.

    python benchmarks/against_published.py path/to/ml-tarflow

Both run the same float32 weights, alternating, on the CPU. Outputs must agree to 1e-4; those of the ``auto`` decoder,
which is exact to a tolerance, to what that tolerance allows. Ratios are those of the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import checkout
from models import CPU_ROWS, GUIDANCE, TRAINING_ROWS, build, fashion_mnist, latents_and_labels, trained
from tarflow import TarFlow
from tarflow.decoding import DISTANCE, TOLERANCE
from tarflow.decoding.calibration import calibrate

CPU = torch.device("cpu")
EXACT = 1e-4
# How far from the published outputs those of each of our contenders may be.
ALLOWED = {"tarflow": EXACT, "sequential": EXACT, "auto": DISTANCE * TOLERANCE}
Contenders = dict[str, Callable[[], torch.Tensor]]


def main() -> None:
    """Print medians in milliseconds, ratios to the published code and distances from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help=checkout.HELP)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    checkout.use(arguments.checkout)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {arguments.rounds} rounds")
    print(f"{'':44}{'':12}{'published':>12}{'tarflow':>12}{'ratio':>8}{'max error':>12}")
    for batch in (16, 1):
        name = f"guided sampling, trained patch 2, batch {batch}"
        _report(name, _sampling(trained(CPU), batch), arguments.rounds)
    for patch_size, batch in CPU_ROWS:
        name = f"guided sampling, patch {patch_size}, batch {batch}"
        _report(name, _sampling(build(fashion_mnist(patch_size), CPU), batch), arguments.rounds)
    for patch_size, batch in TRAINING_ROWS:
        name = f"training step, patch {patch_size}, batch {batch}"
        _report(name, _training(build(fashion_mnist(patch_size), CPU), batch), arguments.rounds)


def _sampling(model: TarFlow, batch: int) -> Contenders:
    """``auto`` as it decides where this batch was calibrated."""
    theirs, (z, labels) = checkout.published(model), latents_and_labels(model, batch)
    model.flow.calibration = calibrate(model.flow, GUIDANCE, batches={1, batch})
    return {
        "published": partial(checkout.sample, theirs, z, labels, GUIDANCE),
        "sequential": partial(model.inverse, z, labels, GUIDANCE, "sequential"),
        "auto": partial(model.inverse, z, labels, GUIDANCE, "auto"),
    }


def _training(model: TarFlow, batch: int) -> Contenders:
    """Loss and gradients; what is compared is the latents."""
    x, labels = torch.rand(batch, 1, 28, 28) * 2 - 1, torch.arange(batch) % 10
    published = checkout.published(model)

    def theirs():
        published.zero_grad()
        z, _, logdets = published(x, labels)
        published.get_loss(z, logdets).backward()
        return z.detach()

    def ours():
        model.zero_grad()
        z, logdet = model(x, labels)
        (0.5 * z.square().mean() - logdet.mean() / model.config.num_dims).backward()
        return z.detach()

    return {"published": theirs, "tarflow": ours}


def _report(name: str, contenders: Contenders, rounds: int) -> None:
    outputs = {contender: run() for contender, run in contenders.items()}
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender, run in contenders.items():
            began = time.perf_counter()
            run()
            times[contender].append(time.perf_counter() - began)
    medians = {contender: 1e3 * statistics.median(taken) for contender, taken in times.items()}
    published = medians.pop("published")
    for contender, median in medians.items():
        error = (outputs[contender] - outputs["published"]).abs().max().item()
        assert error < ALLOWED[contender], f"{name}, {contender}: outputs differ by {error}"
        times_in_ms = f"{published:9.0f} ms{median:9.0f} ms"
        print(f"{name:44}{contender:12}{times_in_ms}{published / median:8.2f}{error:12.1e}", flush=True)
        name = ""


if __name__ == "__main__":
    main()
