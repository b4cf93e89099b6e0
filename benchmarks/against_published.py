"""Measure against a checkout of the paper's code (apple/ml-tarflow), side by side in one process.

    python benchmarks/against_published.py path/to/ml-tarflow

Both run the same float32 weights, alternating, on the CPU; their outputs must agree to 1e-4. The ratio is that of the
medians. Nothing of the checkout is needed for anything else.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from models import CPU_ROWS, TRAINING_ROWS
from tarflow import Guidance, TarFlow

TOLERANCE = 1e-4


def main() -> None:
    """Print a table of medians in milliseconds and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="folder with transformer_flow.py")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.checkout)
    import transformer_flow

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {arguments.rounds} rounds")
    print(f"{'':42}{'published':>12}{'tarflow':>12}{'ratio':>8}{'max error':>12}")
    for patch_size, batch in CPU_ROWS:
        _sampling(*_models(transformer_flow, patch_size), batch, arguments.rounds)
    for patch_size, batch in TRAINING_ROWS:
        _training(*_models(transformer_flow, patch_size), batch, arguments.rounds)


def _sampling(published: torch.nn.Module, ours: TarFlow, batch: int, rounds: int) -> None:
    z = torch.randn(batch, ours.config.num_tokens, ours.config.token_dim)
    labels = torch.arange(batch) % 10

    @torch.no_grad()
    def theirs():
        return published.reverse(z.clone(), labels, guidance=2.0, annealed_guidance=True)

    def mine():
        return ours.inverse(z, labels, Guidance(2.0, "linear"))

    _report(f"guided sampling, patch {ours.config.patch_size}, batch {batch}", theirs, mine, rounds)


def _training(published: torch.nn.Module, ours: TarFlow, batch: int, rounds: int) -> None:
    """Loss and gradients; what is compared is the latents."""
    x, labels = torch.rand(batch, 1, 28, 28) * 2 - 1, torch.arange(batch) % 10

    def theirs():
        published.zero_grad()
        z, _, logdets = published(x, labels)
        published.get_loss(z, logdets).backward()
        return z.detach()

    def mine():
        ours.zero_grad()
        z, logdet = ours(x, labels)
        (0.5 * z.square().mean() - logdet.mean() / ours.config.num_dims).backward()
        return z.detach()

    _report(f"training step, patch {ours.config.patch_size}, batch {batch}", theirs, mine, rounds)


def _models(transformer_flow, patch_size: int) -> tuple[torch.nn.Module, TarFlow]:
    torch.manual_seed(0)
    published = transformer_flow.Model(1, 28, patch_size, 128, 4, 4, num_classes=10)
    for block in published.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    return published, TarFlow.from_published(published.state_dict(), in_channels=1)


def _report(name: str, published: Callable, ours: Callable, rounds: int) -> None:
    error = (published() - ours()).abs().max().item()
    assert error < TOLERANCE, f"{name}: outputs differ by {error}"
    times: dict[Callable, list[float]] = {published: [], ours: []}
    for _ in range(rounds):
        for contender, taken in times.items():
            began = time.perf_counter()
            contender()
            taken.append(time.perf_counter() - began)
    theirs, mine = (1e3 * statistics.median(taken) for taken in times.values())
    print(f"{name:42}{theirs:9.0f} ms{mine:9.0f} ms{theirs / mine:8.2f}{error:12.1e}", flush=True)


if __name__ == "__main__":
    main()
