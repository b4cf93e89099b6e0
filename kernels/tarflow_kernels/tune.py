"""Find the fastest configuration of every kernel on the card at hand, and write it where launchers look.

    python -m tarflow_kernels.tune
    python -m tarflow_kernels.tune --op decode_attention --seconds 60
    python -m tarflow_kernels.tune --problem affine_map:float32,n4096 --problem decode_attention:bfloat16,d64,n1024

For every kernel and problem, the candidates that stand beside the kernel are compiled by several processes. Those that
spill little are checked against the present configuration and timed on the card; the fastest median wins, and a file
``configs/<kernel>,<device>.json`` keeps it as soon as it is found. Ops take turns, and so share what time there is; the
clock is looked at before each candidate, and what comes too late is left as it was. Under Triton's interpreter, where
nothing is compiled and times mean nothing, the same can be rehearsed.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import NamedTuple

import torch

from . import cases

__all__ = ["Problem", "in_turn", "main", "problems", "save", "tune"]

# A candidate, and whether it is fit to be timed, once it is compiled.
Job = tuple[dict[str, int], AsyncResult]
# How many seconds to wait for that.
_PATIENCE = 60
# Bytes for each thread, on AMD's cards registers, that a candidate may spill: more programs at a time can be worth it.
_SPILLED = 64


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

    @property
    def name(self) -> str:
        """The kernel and the key."""
        return f"{self.kernel}:{self.key}"


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


def in_turn(given: Iterable[Problem]) -> list[Problem]:
    """Reorder problems so that the ops take turns; those of an op stay in order."""
    by_op: dict[str, list[Problem]] = {}
    for problem in given:
        by_op.setdefault(problem.kernel.partition("_")[0], []).append(problem)
    turns = itertools.zip_longest(*by_op.values())
    return [problem for turn in turns for problem in turn if problem is not None]


def tune(
    problem: Problem, candidates: Iterable[dict[str, int]], time_left: Callable[[], bool] = lambda: True
) -> tuple[dict[str, int] | None, str]:
    """Find the fastest candidate, or None where the present configuration is faster, and a line to print about it."""
    from triton.runtime.errors import OutOfResources

    from .triton import configs

    launch = problem.make(_device())
    expected = launch()
    times = {"present": _seconds(launch)}
    for candidate in candidates:
        if not time_left():
            break
        with configs.use(problem.kernel, candidate), contextlib.suppress(OutOfResources):
            if _agree(launch(), expected):
                times[json.dumps(candidate)] = _seconds(launch)
    best = min(times, key=lambda name: times[name])
    line = (
        f"{1e6 * times['present']:9.1f} us{1e6 * times[best]:9.1f} us  {best}"
        f"  ({len(times) - 1} of {len(problem.candidates)} candidates timed)"
    )
    return None if best == "present" else json.loads(best), line


def _device() -> str:
    """The device to tune on; the interpreter's is the CPU."""
    from triton import knobs

    return "cpu" if knobs.runtime.interpret else "cuda" if torch.cuda.is_available() else "xpu"


def _seconds(launch: cases.Launch) -> float:
    from triton.testing import do_bench

    if _device() == "cpu":
        began = time.perf_counter()
        launch()
        return time.perf_counter() - began
    return do_bench(launch, warmup=5, rep=40, return_mode="median") / 1e3


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


def _spills_little(index: int, candidate: dict[str, int], target) -> bool:
    """Whether a candidate of a problem compiles and spills at most a few registers; timing finds it cached."""
    from .offline import compile_only, resources
    from .triton import configs

    problem = list(problems())[index]
    with configs.use(problem.kernel, candidate), contextlib.suppress(Exception):  # a compiler's limits are many
        compiled = compile_only(target, lambda: problem.make("meta")())
        return all(resources(kernel).spilled <= _SPILLED for kernel in compiled)
    return False


def _submit(pool: Pool, chosen: list[Problem], target) -> dict[str, list[Job]]:
    """Have the candidates of all problems compiled, in their order."""
    index = {problem.name: i for i, problem in enumerate(problems())}
    return {
        problem.name: [
            (candidate, pool.apply_async(_spills_little, (index[problem.name], candidate, target)))
            for candidate in problem.candidates
        ]
        for problem in chosen
    }


def _fit(jobs: Iterable[Job], deadline: float) -> Iterator[dict[str, int]]:
    """Yield the candidates that compile and spill little, in their order, as long as there is time."""
    for candidate, job in jobs:
        # A compiler that brought its process down never answers.
        with contextlib.suppress(multiprocessing.TimeoutError):
            if job.get(timeout=min(max(deadline - time.monotonic(), 0), _PATIENCE)):
                yield candidate


def _choose(parser: argparse.ArgumentParser, ops: list[str], names: list[str]) -> list[Problem]:
    """The problems that were asked for: by name in the order given, else the ops in turn."""
    known = {problem.name: problem for problem in problems()}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--problem: expected names such as {next(iter(known))}; got {unknown[0]}")
    if names:
        return [known[name] for name in names]
    return in_turn(problem for problem in known.values() if problem.kernel.startswith(tuple(ops) or ""))


def main(argv: list[str] | None = None) -> None:
    """Tune what was asked for, printing a line for each problem: the time of what there was, and the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--op", action="append", default=[], help="tune kernels whose names begin so; all, unless given"
    )
    parser.add_argument(
        "--problem", action="append", default=[], metavar="KERNEL:KEY", help="tune this and those that are given so"
    )
    parser.add_argument("--seconds", type=float, default=3600, help="time no candidate after that time")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, help="folder of the files; where launchers look, unless given")
    arguments = parser.parse_args(argv)
    chosen = _choose(parser, arguments.op, arguments.problem)
    import triton

    from .triton import configs

    interpreted = triton.knobs.runtime.interpret
    if not (torch.cuda.is_available() or torch.xpu.is_available() or interpreted):
        sys.exit("tune: there is no GPU to tune for")
    deadline = time.monotonic() + arguments.seconds
    device = configs.device_name() or "interpreter"
    target = None if interpreted else triton.runtime.driver.active.get_current_target()

    def time_left() -> bool:
        return time.monotonic() < deadline

    print(device, flush=True)
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        jobs = _submit(pool, [] if interpreted else chosen, target)
        for problem in chosen:
            print(f"{problem.name:58}", end="", flush=True)
            if not time_left():
                print("left alone: out of time", flush=True)
                continue
            candidates = problem.candidates if interpreted else _fit(jobs[problem.name], deadline)
            config, line = tune(problem, candidates, time_left)
            if config is not None:
                save(arguments.out or configs.FOLDER, problem.kernel, device, problem.key, config)
            print(line, flush=True)


if __name__ == "__main__":
    main()
