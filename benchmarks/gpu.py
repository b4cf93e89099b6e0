"""Check, tune, measure and profile the kernels on a card, in under ten minutes, with one command.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --skip check,tune --seconds 300
    python benchmarks/gpu.py --rows "guided sampling" --published path/to/ml-tarflow
    python benchmarks/gpu.py --rows "training step" --compiled  # with contenders that take a minute or two to compile
    python benchmarks/gpu.py --device cpu --skip check,tune     # the same on a CPU, with its rows

Nothing needs to be installed but torch, triton, numpy, safetensors and, for the checks, pytest; flows of other
libraries are measured where these are. Results go to ``benchmarks/results/<device>.json`` after every row, so that what
is interrupted is not lost; what was not measured is there too, with the reason. A copy of the repository without its
history names its commit in TARFLOW_COMMIT.
"""

import argparse
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch

import checkout
import device as devices
import profiles
import records
from rows import all_rows

ROOT = Path(__file__).resolve().parents[1]
# What each stage may take of the time that is left when it starts.
SHARES = {"check": 0.25, "tune": 0.25, "measure": 0.9, "profile": 1.0}
_BEGUN = "-- "
# Those that only a card can run come first, in case time runs out.
TESTS = tuple(
    f"tests/tarflow_kernels/test_{name}.py" for name in ("gpu", "triton", "ops", "mixture", "dispatch", "scales")
)


def main() -> int:
    """Run the stages, each within its share of the time."""
    arguments = _arguments()
    checkout.use(arguments.published)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; a CPU is measured with --device cpu", file=sys.stderr)
        return 1
    path = records.path_of(device, arguments.out)
    if arguments.rows:
        _measure_here(device, path, arguments.rows, arguments.compiled)
        return 0
    deadline = time.monotonic() + arguments.seconds
    measure = functools.partial(_measure, compiled=arguments.compiled)
    stages = {"check": _check, "tune": _tune, "measure": measure, "profile": _profile}
    for name, stage in stages.items():
        if name in arguments.skip:
            continue
        seconds = SHARES[name] * (deadline - time.monotonic())
        print(f"== {name}: at most {seconds:.0f} s", flush=True)
        if seconds > 0:
            stage(device, path, seconds)
    print(f"results: {path}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--skip", type=lambda names: names.split(","), default=[], help=f"of {','.join(SHARES)}")
    parser.add_argument("--seconds", type=float, default=560, help="for all stages together")
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder of the results")
    parser.add_argument("--published", type=Path, metavar="PATH", help=checkout.HELP)
    parser.add_argument("--compiled", action="store_true", help="measure contenders under torch.compile too")
    parser.add_argument("--rows", nargs="+", help="measure the rows whose names contain one of these, and nothing else")
    arguments = parser.parse_args()
    unknown = set(arguments.skip) - set(SHARES)
    if unknown:
        parser.error(f"--skip: expected some of {', '.join(SHARES)}; got {', '.join(unknown)}")
    return arguments


def _check(device: torch.device, path: Path, seconds: float) -> None:
    """Run the tests of the kernels, side by side where pytest-xdist is at hand."""
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    records.update(path, check=_kept(_run([sys.executable, "-m", "pytest", "-q", *workers, *TESTS], seconds)))


def _tune(device: torch.device, path: Path, seconds: float) -> None:
    """Look for better configurations than those that are kept, for as long as there is time."""
    # What the tuner has not finished by then it is not allowed to finish: it gets a little less than there is.
    command = [sys.executable, "-m", "tarflow_kernels.tune", "--seconds", str(int(0.85 * seconds))]
    records.update(path, tune=_kept(_run(command, seconds)))


def _measure(device: torch.device, path: Path, seconds: float, compiled: bool) -> None:
    """Measure all rows, in processes that are replaced when a kernel brings one down."""
    deadline = time.monotonic() + seconds
    script = [sys.executable, __file__, "--device", device.type, "--out", str(path.parent), *["--compiled"] * compiled]
    pending, lost = [row.name for row in all_rows(device)], {}
    while pending and (left := deadline - time.monotonic()) > 0:
        outcome = _run([*script, "--rows", *pending], left)
        if outcome["exit"] == 0:
            pending = []
        elif outcome["exit"] is None:
            break
        else:
            begun = [line.removeprefix(_BEGUN) for line in outcome["output"].splitlines() if line.startswith(_BEGUN)]
            last = begun[-1] if begun else pending[0]
            lost[last] = f"its process ended with exit code {outcome['exit']}: {outcome['output'][-200:]}"
            pending = pending[pending.index(last) + 1 :]
    # Those that are recorded keep their measurements.
    lost |= dict.fromkeys(pending, "out of time")
    records.update(
        path, [records.left_out(row, device, lost[row.name]).record for row in all_rows(device) if row.name in lost]
    )


def _measure_here(device: torch.device, path: Path, names: list[str], compiled: bool) -> None:
    """Measure rows in this process; it ends with an error when the device can no longer be used."""
    for row in all_rows(device):
        if not any(name in row.name for name in names):
            continue
        print(f"{_BEGUN}{row.name}", flush=True)
        began = time.monotonic()
        record = records.attempt(row, device, compiled).record
        records.update(path, [record])
        print(f"{_summary(record)}  [{time.monotonic() - began:.0f} s]", flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _profile(device: torch.device, path: Path, seconds: float) -> None:
    """Find where a training step and a decoding step spend their time."""
    tables = {}
    for name, profile in profiles.PROFILES.items():
        try:
            tables[name] = profile(device)
            print(f"{name}: {profiles.summary(tables[name])}", flush=True)
        except Exception as error:  # a profile that fails is no reason to lose the others
            tables[name] = {"unavailable": f"{type(error).__name__}: {error}"[:300]}
            print(f"{name}: {tables[name]['unavailable']}", flush=True)
    records.update(path, profiles=tables, profiles_machine=devices.describe(device))


def _run(command: list[str], seconds: float) -> dict:
    """Run a command, showing what it prints as it comes; its exit code is None where time was up."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # With everything that it started: a compiler's workers would hold its output open.
    timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    late = process.wait() == -signal.SIGKILL and not timer.is_alive()
    timer.cancel()
    return {"command": " ".join(command[1:4]), "exit": None if late else process.returncode, "output": "".join(lines)}


def _kept(outcome: dict) -> dict:
    """The end of what was printed is enough for the results."""
    return outcome | {"output": outcome["output"].strip()[-2000:]}


def _summary(record: records.Record) -> str:
    """Write a row in a line: the medians in milliseconds."""
    if "not_measured" in record:
        return record["not_measured"]
    return ", ".join(
        f"{name} {records.three_digits(1e3 * result['p50'])} ms ({result['percent_of_limit']:.0f} %)"
        for name, result in records.timed(record).items()
    )


if __name__ == "__main__":
    sys.exit(main())
