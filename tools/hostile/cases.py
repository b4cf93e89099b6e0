"""Commands in processes of their own, forked from one that has imported everything, and what became of them."""

import atexit
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # by PyTorch only when it is needed, from where another user may not read
from safetensors.numpy import load

from tarflow.cli import COMMANDS, main

for name in COMMANDS:
    importlib.import_module(f"tarflow.cli.{name}")  # which a fork would import each time

SECONDS = 60  # of a case; `--seconds` sets it
MEMORY = 2**30
TINY = (
    *("--patch-size=7", "--channels=16", "--head-dim=8", "--num-blocks=2", "--layers-per-block=1", "--batch-size=4"),
    *("--device=cpu", "--precision=float32", "--log-every=2", "--evaluate-every=4", "--checkpoint-every=4"),
    *("--sample-every=1000", "--max-steps=8", "--importance-samples=1"),
)
TINY_FLOWPP = (
    *("--model=flowpp", "--stack=squeeze channel2", "--filters=8", "--blocks-per-coupling=1", "--num-mixtures=2"),
    *("--noise=uniform", "--dropout=0.2", *TINY[5:]),
)
# Verdicts of a broken promise; the others are "same" and "changed" results, and "refused" in one line.
FINDINGS = ("traceback", "hang", "signal", "memory", "unclear", "wrong", "executed", "lost")


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit status (negative: the signal), what it printed, its peak memory in bytes."""

    status: int
    stdout: str
    stderr: str
    peak: int
    seconds: float
    stopped: str | None = None

    @property
    def lines(self) -> list[str]:
        """The lines on stderr, without bars of progress."""
        lines = self.stderr.replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip() and "%|" not in line and "?step/s" not in line]

    def verdict(self, usual_peak: int) -> str:
        """``accepted``, ``refused`` in one line, or what is wrong with it."""
        if self.stopped == "memory" or self.peak > usual_peak + MEMORY:
            return "memory"
        if self.stopped:
            return "hang"
        if self.status < 0:
            return "signal"
        if "Traceback" in self.stderr:
            return "traceback"
        if self.status == 0:
            return "accepted"
        one_line = len(self.lines) == 1 and self.lines[0].startswith("tarflow")
        return "refused" if one_line and self.status in (1, 2) else "unclear"


class Process:
    """A command in a fork of this process, the leader of a group of its own."""

    def __init__(self, argv: Sequence[str], cwd: Path, prepare: Callable[[], None] = lambda: None):
        self.logs = [cwd.parent / f"{cwd.name}.{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        for log in self.logs:
            log.touch()
        self.began = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(list(map(str, argv)), cwd, prepare)
        self.ended: Ended | None = None

    def _run(self, argv: list[str], cwd: Path, prepare: Callable[[], None]) -> None:
        status = 1
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # nothing outlives the campaign
            os.chdir(cwd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, log in enumerate(self.logs, 1):
                os.dup2(os.open(log, os.O_WRONLY), number)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            prepare()
            status = main(argv)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(status)

    def poll(self, stopped: str | None = None, flags: int = os.WNOHANG) -> Ended | None:
        """How it ended; None while it runs."""
        if self.ended is None:
            pid, status, usage = os.wait4(self.pid, flags)
            if pid:
                texts = [log.read_text(errors="replace") for log in self.logs]
                for log in self.logs:
                    log.unlink()
                code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.began
                self.ended = Ended(code, *texts, usage.ru_maxrss * 1024, seconds, stopped)
        return self.ended

    def kill(self, stopped: str = "killed") -> Ended:
        """``kill -9`` of the group."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL) if os.getpgid(self.pid) == self.pid else os.kill(self.pid, 9)
        return self.poll(stopped, 0)

    def wait(self, memory: int = 4 * 2**30) -> Ended:
        """How it ends, which is by force beyond :data:`SECONDS` or so many bytes."""
        page = os.sysconf("SC_PAGESIZE")
        while (ended := self.poll()) is None:
            if time.monotonic() - self.began > SECONDS:
                return self.kill("time")
            if int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * page > memory:
                return self.kill("memory")
            time.sleep(0.01)
        return ended


def run(argv: Sequence[str], cwd: Path, **settings) -> Ended:
    """A command from its start to its end."""
    process = Process(argv, cwd, **settings)
    try:
        return process.wait()
    finally:
        process.kill()


def must_run(argv: Sequence[str], cwd: Path) -> Ended:
    """A command that has to succeed, because all cases are compared with it."""
    ended = run(argv, cwd)
    if ended.status:
        raise RuntimeError(f"tarflow {' '.join(map(str, argv))} fails unharmed: {ended.stderr}")
    return ended


def results(folder: Path, names: Sequence[str]) -> dict[str, list]:
    """The files that a command wrote, in a form to compare: arrays and numbers, without clocks."""
    found = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            found[name] = []
        elif path.suffix == ".safetensors":
            found[name] = [array for _, array in sorted(load(path.read_bytes()).items())]
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = [arrays[key].astype(np.int64) for key in sorted(arrays.files)]
        elif path.suffix == ".jsonl":
            found[name] = [np.array([list(row.values()) for row in kind]) for kind in _rows(path)]
        else:
            found[name] = [np.array([[row["mean"] for row in json.loads(path.read_text())["scores"].values()]])]
    return found


def _rows(path: Path) -> list[list[dict]]:
    """The rows of metrics, those of training and those of evaluation apart, without their speed."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]
    return [[row for row in rows if ("loss" in row) == trained] for trained in (True, False)]


def same(one: dict[str, list], other: dict[str, list]) -> bool:
    """Whether results are equal; drawn pixels may differ by one, because decoders agree to a tolerance."""
    if {name: [a.shape for a in arrays] for name, arrays in one.items()} != {
        name: [a.shape for a in arrays] for name, arrays in other.items()
    }:
        return False
    pairs = ((name, a, b) for name in one for a, b in zip(one[name], other[name], strict=True))
    return all(np.all(np.abs(a - b) <= 1) if name.endswith(".npz") else np.array_equal(a, b) for name, a, b in pairs)


def sound(found: dict[str, list]) -> bool:
    """Whether results can mean something: all there, finite, and pictures of more than one grey."""
    for name, arrays in found.items():
        if not arrays or not all(np.isfinite(array).all() for array in arrays):
            return False
        if name.endswith(".npz") and arrays[0].size and np.ptp(arrays[0]) == 0:
            return False
    return True


def newest_state(folder: Path) -> dict:
    """The newest checkpoint of a run."""
    return torch.load(max((folder / "checkpoints").glob("step-*.pt")), map_location="cpu", weights_only=True)


def equal_trees(one, other) -> bool:
    """Whether nested dictionaries and lists of tensors are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_trees(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_trees, one, other))
    return one == other
