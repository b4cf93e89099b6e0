"""The device under test: its name, how fast it copies and multiplies at best, and how to time work on it."""

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

LOST = "the GPU is lost to this process"
LEAST_ROUNDS, MOST_ROUNDS = 5, 50
# What takes so many times longer than it was given is content with fewer rounds.
_OVERTIME = 10
# Reading it empties any L2, and takes a GPU long enough for the host to have launched what is timed next.
_FLUSHED_BYTES = 2**30


def pick() -> torch.device:
    """Pick the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_alive(failure: Exception) -> None:
    """End this process where an error has cost it its GPU: nothing works any more, and the next would be blamed.

    Raises:
        SystemExit: the GPU takes no more work.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        sys.exit(f"{LOST}: {type(failure).__name__}: {failure}")


# Timing ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """Something to time, and the context that it runs in, which is entered before the clock starts."""

    run: Callable[[], Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def interleave(
    contenders: dict[str, Timed], device: torch.device, seconds: float, flush: bool, rounds: int = 3
) -> dict[str, list[float]]:
    """Time each contender in turn until ``seconds`` have passed, in so many rounds at least; times are in seconds.

    On a GPU by events, where ``flush`` starts each with a cold L2; on a CPU by the clock, caches as they are.
    """
    if device.type == "cuda":
        scratch = torch.zeros(_FLUSHED_BYTES // 4, device=device) if flush else None
        measure = functools.partial(seconds_by_events, scratch=scratch)
    else:
        measure = seconds_by_clock
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    for done in range(MOST_ROUNDS):
        allowed = seconds if done >= LEAST_ROUNDS else _OVERTIME * seconds
        if done >= rounds and time.perf_counter() - began > allowed:
            break
        for name, contender in contenders.items():
            with contender.context():
                times[name].append(measure(contender.run))
    return times


def seconds_by_events(run: Callable, scratch: torch.Tensor | None) -> float:
    """Time a run on a GPU, after ``scratch`` took its place in the L2."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if scratch is not None:
        # Not written: what is timed would have to write it back.
        scratch.sum()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds_by_clock(run: Callable) -> float:
    """Time a run on the host."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def percentiles(times: list[float]) -> dict[str, float]:
    """Return p20, p50 and p80.

    >>> percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    {'p20': 2.0, 'p50': 3.5, 'p80': 5.0}
    """
    return {f"p{percent}": float(np.percentile(times, percent)) for percent in (20, 50, 80)}


def captured(contender: Timed) -> Timed:
    """Capture the work in a CUDA graph, so that launches cost the host nothing."""
    aside = _capture_stream()
    aside.wait_stream(torch.cuda.current_stream())
    with contender.context(), torch.cuda.stream(aside):
        for _ in range(3):
            contender.run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with contender.context(), torch.cuda.graph(graph, stream=aside):
        contender.run()
    return replace(contender, run=graph.replay)


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """The one stream that captures: libraries keep a workspace for every stream they see."""
    return torch.cuda.Stream()


# Limits ---------------------------------------------------------------------------------------------------------------


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes read and bytes written per second by a large copy."""
    source = torch.rand((2**30 if device.type == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), device)


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product of random numbers."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median(lambda: left @ right, device)


def _median(run: Callable, device: torch.device) -> float:
    run()
    return percentiles(interleave({"": Timed(run)}, device, seconds=0.5, flush=False)[""])["p50"]


# Names ----------------------------------------------------------------------------------------------------------------


@functools.cache
def describe(device: torch.device) -> dict[str, Any]:
    """Say where a measurement was made."""
    return {
        "device": _name(device),
        "driver": _driver() if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": os.environ.get("TARFLOW_COMMIT") or _commit(),
    }


def slug(device: torch.device) -> str:
    """Name the device as a file.

    >>> slug(torch.device("cpu")) == slug(torch.device("cpu")).lower()
    True
    """
    return re.sub(r"[^a-z0-9]+", "-", _name(device).lower()).strip("-")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return re.sub(r"\((R|TM)\)", "", line.partition(":")[2].strip())
    return platform.processor() or platform.machine()


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]


def _commit() -> str:
    here = ("git", "-C", str(Path(__file__).parent))
    # Results, plots and the tables made of them are no part of what is measured.
    code = ("--", ":/", ":(exclude,top)benchmarks/results", ":(exclude,top)docs", ":(exclude,top,glob)**/*.md")
    changed = " with changes" if _output(*here, "status", "--porcelain", "-uno", *code) not in ("", "unknown") else ""
    return _output(*here, "rev-parse", "--short", "HEAD") + changed


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def _output(*command: str) -> str:
    """Return what a command prints, or ``unknown``."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
