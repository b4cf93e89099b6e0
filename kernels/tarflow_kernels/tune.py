"""Find the fastest configuration of every kernel on the card at hand, and write it where launchers look.

    python -m tarflow_kernels.tune
    python -m tarflow_kernels.tune --op decode_attention --seconds 60

For every kernel and problem, the candidates that stand beside the kernel are compiled by several processes; those that
spill nothing are checked against the default configuration and timed on the card, the fastest median wins, and a file
``configs/<kernel>,<device>.json`` keeps it. Running out of time leaves problems as they were.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

HEADS, HEAD_DIM = 12, 64


class Problem(NamedTuple):
    """What a kernel is tuned on: a shape and dtype, large enough to fill any card."""

    kernel: str
    key: str
    candidates: list[dict[str, int]]
    make: Callable[[str], Callable[[], object]]
    """from a device to a launch on tensors there, which returns what the kernel computed"""


def problems() -> Iterator[Problem]:
    """The sizes of the published models first."""
    from .triton import affine, attention, decode

    def attend(phase, dtype, length, head_dim):
        key = f"{dtype},d{head_dim},n{length}"
        make = functools.partial(_attend, phase, getattr(torch, dtype), length, head_dim)
        return Problem(f"causal_attention_{phase}", key, attention.CANDIDATES[phase], make)

    shapes = [("bfloat16", n, 64) for n in (1024, 256, 4096, 64, 128, 512, 2048)]
    shapes += [("bfloat16", n, 128) for n in (1024, 256, 4096)] + [("float32", n, 64) for n in (1024, 256)]
    for dtype, length, head_dim in shapes:
        for phase in ("forward", "backward_queries", "backward_keys"):
            yield attend(phase, dtype, length, head_dim)
        key = f"{dtype},d{head_dim},n{length}"
        make = functools.partial(_decode, getattr(torch, dtype), length, head_dim)
        yield Problem("decode_attention", key, decode.CANDIDATES, make)
    for dtype in ("bfloat16", "float32"):
        for inner in (64, 4096):  # elements of a sample; one of 4096 and more is cut into parts
            for kernel in ("affine_map", "affine_map_backward", "guided_affine_map"):
                make = functools.partial(_affine, kernel, getattr(torch, dtype), inner)
                yield Problem(kernel, f"{dtype},n{inner}", affine.CANDIDATES, make)


def tune(problem: Problem, candidates: list[dict[str, int]]) -> tuple[dict[str, int] | None, str]:
    """The fastest candidate, None where it is the default, and a line that says what was found."""
    import triton
    from triton.runtime.errors import OutOfResources

    from .triton import configs

    launch = problem.make("cuda" if torch.cuda.is_available() else "xpu")
    time_it = functools.partial(triton.testing.do_bench, launch, warmup=5, rep=40, return_mode="median")
    expected = launch()
    times = {"default": time_it()}
    for candidate in candidates:
        with configs.use(problem.kernel, candidate), contextlib.suppress(OutOfResources):
            if _agree(launch(), expected):
                times[json.dumps(candidate)] = time_it()
    best = min(times, key=times.get)
    line = (
        f"{problem.kernel:34}{problem.key:24}{1e3 * times['default']:9.1f} us{1e3 * times[best]:9.1f} us  {best}"
        f"  ({len(times) - 1} of {len(problem.candidates)} candidates timed)"
    )
    return None if best == "default" else json.loads(best), line


def _agree(results, expected) -> bool:
    """Whether results differ by no more than another order of summation in low precision makes them."""
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (results, expected)), strict=True)
    return all((a.float() - b.float()).norm() <= 1e-2 * b.float().norm() for a, b in pairs)


def save(folder: Path, kernel: str, device: str, key: str, config: dict[str, int] | None) -> None:
    """Put one finding into the file of its kernel and device; the rest of the file stays."""
    path = folder / f"{kernel},{device}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table.pop(key, None)
    if config is not None:
        table[key] = config
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.tmp")
    beside.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    beside.replace(path)


def precompile(workers: int) -> list[concurrent.futures.Future]:
    """Fill Triton's cache from several processes, one problem each, so that timing finds everything compiled."""
    import triton

    target = triton.runtime.driver.active.get_current_target()
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    jobs = [pool.submit(_compile_candidates, i, target) for i in range(len(list(problems())))]
    pool.shutdown(wait=False)
    return jobs


def _compile_candidates(index: int, target) -> list[dict[str, int]]:
    """Those that compile and spill nothing."""
    from .inspect import compile_only, resources
    from .triton import configs

    problem = list(problems())[index]
    kept = []
    for candidate in problem.candidates:
        with configs.use(problem.kernel, candidate), contextlib.suppress(Exception):  # a compiler's limits are many
            if not any(resources(kernel).spilled for kernel in compile_only(target, lambda: problem.make("meta")())):
                kept.append(candidate)
    return kept


def _attend(phase: str, dtype: torch.dtype, length: int, head_dim: int, device: str) -> Callable[[], object]:
    from .triton.attention import causal_attention_backward, causal_attention_forward

    rows = max(32, 32768 // length)
    qkv = torch.randn(rows, length, 3, HEADS, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scale = head_dim**-0.5
    if phase == "forward":
        return lambda: causal_attention_forward(q, k, v, None, scale)
    out, lse = causal_attention_forward(q, k, v, None, scale)
    return lambda: causal_attention_backward(out, q, k, v, out, lse, None, scale)


def _decode(dtype: torch.dtype, capacity: int, head_dim: int, device: str) -> Callable[[], object]:
    from .triton.decode import decode_attention

    q, k, v = torch.randn(64, 1, 3, HEADS, head_dim, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
    caches = torch.randn(2, 64, HEADS, capacity, head_dim, dtype=dtype, device=device)
    positions = torch.full((64,), capacity - 1, dtype=torch.int32, device=device)
    return lambda: decode_attention(q, k, v, *caches, positions, None, head_dim**-0.5)


def _affine(kernel: str, dtype: torch.dtype, inner: int, device: str) -> Callable[[], object]:
    from .triton import affine

    rows, token_dim = 2**24 // inner, 16
    x = torch.randn(rows, inner // token_dim, token_dim, device=device)
    alpha, mu = torch.randn(rows, inner // token_dim, 2 * token_dim, dtype=dtype, device=device).chunk(2, dim=-1)
    exp = ("exp", 0.0, 0.0)
    if kernel == "affine_map":
        return lambda: affine.affine_map(x, mu, alpha, True, False, *exp)
    if kernel == "guided_affine_map":
        out = torch.empty_like(x)
        return lambda: affine.guided_affine_map(x, mu, alpha, mu, alpha, None, 2.0, out) or out
    z, logdet = affine.affine_map(x, mu, alpha, True, False, *exp)
    return lambda: affine.affine_map_backward(x, logdet, z, alpha, x.dtype, mu.dtype, True, False, *exp)


def main(argv: list[str] | None = None) -> None:
    """Tune what was asked for, printing a line for each problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="tune kernels whose names begin so; all of them, unless given")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no problem after that time")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, help="folder of the files; where launchers look, unless given")
    arguments = parser.parse_args(argv)
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        sys.exit("tune: there is no GPU to tune for")
    from .triton import configs

    deadline = time.monotonic() + arguments.seconds
    device = configs.device_name()
    print(f"{device}: default and fastest", flush=True)
    for problem, compiled in zip(problems(), precompile(arguments.workers), strict=True):
        if arguments.op and not problem.kernel.startswith(tuple(arguments.op)):
            compiled.cancel()
            continue
        try:
            candidates = compiled.result(timeout=max(deadline - time.monotonic(), 0))
        except TimeoutError:
            compiled.cancel()
            print(f"{problem.kernel:34}{problem.key:24}left alone: out of time", flush=True)
            continue
        config, line = tune(problem, candidates)
        save(arguments.out or configs.FOLDER, problem.kernel, device, problem.key, config)
        print(line, flush=True)


if __name__ == "__main__":
    main()
