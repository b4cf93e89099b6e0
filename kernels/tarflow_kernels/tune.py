"""Find the fastest configuration of every kernel on the card at hand, and write it where launchers look.

    python -m tarflow_kernels.tune
    python -m tarflow_kernels.tune --op decode_attention --seconds 60

For every kernel and problem, the candidates that stand beside the kernel are compiled by several processes. Those that
spill nothing are checked against the present configuration and timed on the card; the fastest median wins, and a file
``configs/<kernel>,<device>.json`` keeps it. Running out of time leaves problems as they were.
"""

import argparse
import contextlib
import functools
import itertools
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
    from .triton import affine, attention, decode, mixture

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
        for components, order in itertools.product((32, 4), ("elements", "components")):
            for kernel in ("mixture_map", "mixture_map_backward", "mixture_map_inverse"):
                key = f"{dtype},k{components},{order},n2048"
                make = functools.partial(_mix, kernel, getattr(torch, dtype), components, order)
                yield Problem(kernel, key, mixture.candidates(order, components), make)


def tune(problem: Problem, candidates: list[dict[str, int]]) -> tuple[dict[str, int] | None, str]:
    """The fastest candidate, None where what there is is faster, and a line that says what was found."""
    import triton
    from triton.runtime.errors import OutOfResources

    from .triton import configs

    launch = problem.make("cuda" if torch.cuda.is_available() else "xpu")
    time_it = functools.partial(triton.testing.do_bench, launch, warmup=5, rep=40, return_mode="median")
    expected = launch()
    times = {"present": time_it()}
    for candidate in candidates:
        with configs.use(problem.kernel, candidate), contextlib.suppress(OutOfResources):
            if _agree(launch(), expected):
                times[json.dumps(candidate)] = time_it()
    best = min(times, key=times.get)
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
    """Those that compile and spill nothing; they are in Triton's cache then, where timing finds them."""
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


def _mix(kernel: str, dtype: torch.dtype, components: int, order: str, device: str) -> Callable[[], object]:
    """As a coupling of Flow++ has it, whose last layer is channels first, as in PyTorch, or last."""
    from .triton.mixture import mixture_map, mixture_map_backward

    outputs = torch.randn(64, 3, 32, 16, 2 + 3 * components, device=device).to(dtype)
    if order == "elements":
        outputs = outputs.movedim(-1, 2).contiguous().movedim(2, -1)
    x, theta = torch.randn(64, 3, 32, 16, device=device), outputs[..., 2:].chunk(3, dim=-1)
    if kernel != "mixture_map_backward":
        return lambda: mixture_map(x, *theta, -7.0, kernel == "mixture_map_inverse")
    v, logdet = mixture_map(x, *theta, -7.0, False)
    return lambda: mixture_map_backward(v, logdet, x, *theta, x.dtype, -7.0, False)


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
