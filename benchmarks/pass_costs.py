"""Measure what a parallel pass costs on this device, in steps of the sequential decoder: the table of ``auto``.

    python benchmarks/pass_costs.py                     # a minute; on a machine that does nothing else

Prints, for rows and windows, the cost of a pass, and for rows the smallest ``PassCost(rows, 3.6, per_token)`` that is
no less, for ``PASS_COSTS`` of ``tarflow/decoding/decoder.py``. It is that of the worst of several sizes of a block.
"""

import argparse
import time
from collections.abc import Callable

import torch

from device import describe
from models import build
from tarflow import TarFlowConfig
from tarflow.decoding.jacobi import JacobiIteration
from tarflow.decoding.sequential import sequential
from tarflow.transformer import Context

FIXED = 3.6
ROWS = 1, 2, 4, 8
WINDOWS = 16, 64, 195
# Blocks of 196 tokens: the default one, a wide one, and a deep one.
BLOCKS = {
    f"width {channels}, {layers} layers": TarFlowConfig(28, 1, 2, channels, num_blocks=1, layers_per_block=layers)
    for channels, layers in ((128, 2), (768, 4), (256, 8))
}


def main() -> None:
    """Measure all blocks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is timed; the best time counts")
    rounds = parser.parse_args().rounds
    print(describe(torch.device("cpu")))
    per_token = dict.fromkeys(ROWS, 0.0)
    for name, config in BLOCKS.items():
        for rows in ROWS:
            costs = pass_costs(config, rows, rounds)
            per_token[rows] = max(per_token[rows], *((cost - FIXED) / window for window, cost in costs.items()))
            print(f"{name}, {rows} rows: " + ", ".join(f"{cost:.1f} ({window})" for window, cost in costs.items()))
    print(", ".join(f"PassCost({rows}, {FIXED}, {slope:.3f})" for rows, slope in per_token.items()))


@torch.inference_mode()
def pass_costs(config: TarFlowConfig, rows: int, rounds: int) -> dict[int, float]:
    """Return the cost of a pass over each window, in the middle of a sequence, in steps of so many rows."""
    model = build(config, torch.device("cpu"))
    transformer, z = model.flow.blocks[0].transformer, model.flow.sample_prior(rows)
    last = config.num_tokens - 1
    passes = {window: _pass(JacobiIteration(transformer, z, Context(), None, window, 0.0)) for window in WINDOWS}
    step, *taken = best_times([lambda: sequential(transformer, z), *passes.values()], rounds)
    return {window: seconds / (step / last) for window, seconds in zip(passes, taken, strict=True)}


def _pass(iteration: JacobiIteration) -> Callable[[], None]:
    middle = (iteration.last - iteration.window) // 2

    def run() -> None:
        iteration.num_accepted.fill_(middle)
        iteration.advance()

    return run


def best_times(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Run all in turn, so many times, and return the shortest time of each in seconds."""
    times = [[_seconds(run) for run in runs] for _ in range(rounds + 1)]  # the first sets itself up
    return [min(column) for column in zip(*times[1:], strict=True)]


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
