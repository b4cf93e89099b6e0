"""Draw docs/decoders.png: the same latents through the sequential and the Jacobi decoder, and their difference.

python tools/draw_decoders.py [folder of a run, by default the trained model of the benchmarks]
"""

import sys
from pathlib import Path

import torch

from tarflow import Decoder, Guidance, TarFlow, pictures
from tarflow.decoding import TOLERANCE

ROOT = Path(__file__).parents[1]
MAGNIFIED = 20


def main() -> None:
    """Draw eight classes, guided and denoised as `tarflow sample` does."""
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "trained" / "fashion-mnist"
    model = TarFlow.from_pretrained(run).float().eval()
    exact, parallel = (draw(model, decoder) for decoder in (Decoder("sequential"), Decoder("jacobi")))
    difference = MAGNIFIED * (parallel - exact)
    largest = (parallel - exact).abs().max().item()
    labels = ["sequential", f"jacobi, tolerance {TOLERANCE:g}", f"difference × {MAGNIFIED}"]
    title = f"Values in [−1, 1]; the largest difference is {largest:.3f}"
    pictures.sample_grid(torch.stack((exact, parallel, difference)), ROOT / "docs" / "decoders.png", title, labels)


def draw(model: TarFlow, decoder: Decoder) -> torch.Tensor:
    """Sample the same eight latents with a decoder."""
    generator = torch.Generator().manual_seed(0)
    return model.sample(8, torch.tensor([0, 1, 2, 3, 4, 6, 8, 9]), Guidance(2.0), 0.1, decoder, generator)


if __name__ == "__main__":
    main()
