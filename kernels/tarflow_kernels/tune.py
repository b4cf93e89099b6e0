"""Find the fastest configuration of every kernel on the card at hand, and write it where launchers look.

    python -m tarflow_kernels.tune
    python -m tarflow_kernels.tune --op decode_attention --seconds 60

For every kernel and problem, the candidates that stand beside the kernel are compiled by several processes. Those that
spill nothing are checked against the present configuration and timed on the card; the fastest median wins, and a file
``configs/<kernel>,<device>.json`` keeps it. Running out of time leaves problems as they were.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import cases

__all__ = ["Problem", "main", "problems", "save", "tune"]


class Problem(NamedTuple):
    """A shape and dtype on which a kernel is tuned, large enough to fill any card.

    Attributes:
        kernel: its name in the tables.
        key: the row of the table, as a launcher looks it up.
        candidates: the configurations to try.
        make: from a device to a launch on tensors there, which returns what the kernel computed.
    """

    kernel: str
    key: str
    candidates: list[dict[str, int]]
    make: Callable[[str], cases.Launch]


def problems() -> Iterator[Problem]:
    """Yield every problem, the sizes of the published models first."""
    from .triton import affine, attention, decode, mixture

    shapes = [("bfloat16", n, 64) for n in (1024, 256, 4096, 64, 128, 512, 2048)]
    shapes += [("bfloat16", n, 128) for n in (1024, 256, 4096)] + [("float32", n, 64) for n in (1024, 256)]
    for name, length, head_dim in shapes:
        dtype, key = getattr(torch, name), f"{name},d{head_dim},n{length}"
        for phase, candidates in attention.CANDIDATES.items():
            make = partial(_attention, phase, dtype, length, head_dim)
            yield Problem(f"causal_attention_{phase}", key, candidates, make)
        make = partial(cases.decoding, dtype=dtype, rows=64, new=1, head_dim=head_dim, capacity=length)
        yield Problem("decode_attention", key, decode.CANDIDATES, make)
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        for inner in (64, 4096):  # elements of a sample; one of 4096 and more is cut into parts
            for backward, kernel in enumerate(("affine_map", "affine_map_backward")):
                make = partial(_affine, backward, dtype, inner)
                yield Problem(kernel, f"{name},n{inner}", affine.CANDIDATES, make)
        for components, order in itertools.product((32, 4), ("elements", "components")):
            for kernel in ("mixture_map", "mixture_map_backward", "mixture_map_inverse"):
                key = f"{name},k{components},{order},n2048"
                yield Problem(
                    kernel,
                    key,
                    mixture.candidates(order, components),
                    partial(_mixture, kernel, dtype, components, order),
                )


def _attention(phase: str, dtype: torch.dtype, length: int, head_dim: int, device: str) -> cases.Launch:
    return cases.attention(device, dtype, max(32, 32768 // length), length, head_dim)[phase != "forward"]


def _affine(phase: int, dtype: torch.dtype, inner: int, device: str) -> cases.Launch:
    return cases.affine(device, dtype, 2**24 // inner, inner // 16, 16)[phase]


def _mixture(kernel: str, dtype: torch.dtype, components: int, order: str, device: str) -> cases.Launch:
    launches = cases.mixture(device, dtype, 64, components, order, inverse=kernel == "mixture_map_inverse")
    return launches[kernel == "mixture_map_backward"]


def tune(problem: Problem, candidates: list[dict[str, int]]) -> tuple[dict[str, int] | None, str]:
    """Find the fastest candidate, or None where the present configuration is faster, and a line to print about it."""
    import triton
    from triton.runtime.errors import OutOfResources

    from .triton import configs

    launch = problem.make("cuda" if torch.cuda.is_available() else "xpu")
    time_it = partial(triton.testing.do_bench, launch, warmup=5, rep=40, return_mode="median")
    expected = launch()
    times = {"present": time_it()}
    for candidate in candidates:
        with configs.use(problem.kernel, candidate), contextlib.suppress(OutOfResources):
            if _agree(launch(), expected):
                times[json.dumps(candidate)] = time_it()
    best = min(times, key=lambda name: times[name])
    line = (
        f"{1e3 * times['present']:9.1f} us{1e3 * times[best]:9.1f} us  {best}"
        f"  ({len(times) - 1} of {len(problem.candidates)} candidates timed)"
    )
    return None if best == "present" else json.loads(best), line


def _agree(results, expected) -> bool:
    """Whether results differ by no more than another order of summation in low precision makes them."""
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (results, expected)), strict=True)
    return all((a.float() - b.float()).norm() <= 1e-2 * b.float().norm() for a, b in pairs)


def save(folder: Path, kernel: str, device: str, key: str, config: dict[str, int]) -> None:
    """Put one finding into the file of its kernel and device; the rest of the file stays."""
    path = folder / f"{kernel},{device}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.tmp")
    beside.write_text(json.dumps(dict(sorted((table | {key: config}).items())), indent=1) + "\n")
    beside.replace(path)


def _compile_candidates(index: int, target) -> list[dict[str, int]]:
    """The candidates that compile and spill nothing; timing finds them in Triton's cache."""
    from .resources import compile_only, resources
    from .triton import configs

    problem = list(problems())[index]
    kept = []
    for candidate in problem.candidates:
        with configs.use(problem.kernel, candidate), contextlib.suppress(Exception):  # a compiler's limits are many
            if not any(resources(kernel).spilled for kernel in compile_only(target, lambda: problem.make("meta")())):
                kept.append(candidate)
    return kept


def main(argv: list[str] | None = None) -> None:
    """Tune what was asked for, printing a line for each problem: the time of what there was, and the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="tune kernels whose names begin so; all, unless given")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no problem after that time")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, help="folder of the files; where launchers look, unless given")
    arguments = parser.parse_args(argv)
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        sys.exit("tune: there is no GPU to tune for")
    import triton

    from .triton import configs

    deadline = time.monotonic() + arguments.seconds
    device, target = configs.device_name(), triton.runtime.driver.active.get_current_target()
    assert device is not None  # there is a GPU
    print(device, flush=True)
    asked = tuple(arguments.op or [""])
    chosen = [(i, problem) for i, problem in enumerate(problems()) if problem.kernel.startswith(asked)]
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        jobs = [(problem, pool.apply_async(_compile_candidates, (i, target))) for i, problem in chosen]
        for problem, compiled in jobs:
            print(f"{problem.kernel:34}{problem.key:24}", end="", flush=True)
            try:
                candidates = compiled.get(timeout=max(deadline - time.monotonic(), 0))
            except multiprocessing.TimeoutError:
                print("left alone: out of time", flush=True)
                continue
            config, line = tune(problem, candidates)
            if config is not None:
                save(arguments.out or configs.FOLDER, problem.kernel, device, problem.key, config)
            print(line, flush=True)


if __name__ == "__main__":
    main()
