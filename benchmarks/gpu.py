"""Try, measure, check, tune and profile the kernels on a card, in under ten minutes, with one command.

    python benchmarks/gpu.py                    # on a card
    python benchmarks/gpu.py --plan             # what it will do, and when
    python benchmarks/gpu.py --continue         # go on where the call before was cut off
    python benchmarks/gpu.py --continue --compiled      # with contenders that take a minute or two to compile
    python benchmarks/gpu.py --rows "guided sampling" --published path/to/ml-tarflow
    python benchmarks/gpu.py --device cpu       # the same on a CPU, with its rows
    python benchmarks/gpu.py --rehearse         # the same on a CPU, interpreted, with tiny shapes

Whenever it is cut off there is evidence: what is asked for first comes first, each stage has its time, a kernel that
hangs or crashes costs its own process alone, and all that is found is written at once, to
``benchmarks/results/<device>.json``, which is all that ``--continue`` needs. A kernel that does not work is tried with
ever safer configurations; what was not measured is in the results too, with the reason.

Nothing needs to be installed but torch, triton, numpy, safetensors and, for the checks, pytest and hypothesis; flows of
other libraries are measured where these are. A copy of the repository without its history names its commit in
TARFLOW_COMMIT.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch

import checkout
import device as devices
import processes
import records
import stages

SECONDS = 560
# What does the tasks of the stages.
TASKS = Path(__file__).with_name("tasks.py")


class Stage(NamedTuple):
    """A stage, its share of the time in parts of ``SECONDS``, and what it does."""

    run: Callable[[stages.Run, float], bool]
    seconds: float
    what: str


STAGES = {
    "smoke": Stage(stages.smoke, 90, "every kernel once, against the formula; each in a process of its own"),
    "rows": Stage(
        stages.rows, 230, "the rows of the targets: ops, trained sampling, training, large sampling; the rest"
    ),
    "check": Stage(stages.check, 100, "the tests of the kernels, in several processes"),
    "tune": Stage(stages.tune, 70, "configurations for the worst rows, the ops in turn"),
    "again": Stage(stages.again, 40, "rows whose kernels were tuned, once more"),
    "profile": Stage(stages.profile, 30, "where a training step, a decoding step and a Jacobi pass spend their time"),
}


def main() -> int:
    """Run the stages, each in its time; what one leaves is for those behind it."""
    arguments = _arguments()
    if arguments.rehearse:
        _rehearse(arguments.out)
    checkout.use(arguments)
    if arguments.plan:
        print(plan(arguments.skip, arguments.seconds))
        return 0
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; a CPU is measured with --device cpu", file=sys.stderr)
        return 1
    run = stages.Run(
        device,
        records.path_of(device, arguments.out),
        [sys.executable, str(TASKS)],
        compiled=arguments.compiled,
        named=tuple(arguments.rows),
        go_on=arguments.go_on,
        silence=stages.SILENCE if device.type == "cuda" else {},  # a CPU may take its time
    )
    # Where a shell has put it into the background, it and all that it starts would not hear an interruption.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return run_stages(run, arguments.skip, arguments.seconds)
    except KeyboardInterrupt:
        print("interrupted; --continue goes on from here", flush=True)
        return 130
    finally:
        processes.stop_all()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--plan", action="store_true", help="print the plan, and do nothing")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep what was found at this commit")
    parser.add_argument("--skip", type=lambda names: names.split(","), default=[], help=f"of {','.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder of the results")
    for code in checkout.CODES:
        parser.add_argument(code.option, type=Path, metavar="PATH", help=code.help)
    parser.add_argument("--compiled", action="store_true", help="measure contenders under torch.compile too")
    parser.add_argument(
        "--rows", nargs="+", default=[], help="measure the rows whose names contain one of these, and nothing else"
    )
    parser.add_argument("--rehearse", action="store_true", help="run all stages on a CPU, interpreted, on tiny shapes")
    arguments = parser.parse_args()
    if unknown := set(arguments.skip) - set(STAGES):
        parser.error(f"--skip: expected some of {', '.join(STAGES)}; got {', '.join(unknown)}")
    if arguments.rows:
        arguments.skip = [name for name in STAGES if name != "rows"]
    return arguments


def _rehearse(out: Path) -> None:
    """Become the rehearsal, whose results and configurations are never mixed with others."""
    folder = tempfile.mkdtemp(prefix="rehearsal-") if out == records.FOLDER else str(out.resolve())
    options = [option for option in sys.argv[1:] if option != "--rehearse"]
    os.execve(
        sys.executable,
        [
            *(sys.executable, str(Path(__file__).with_name("rehearsal.py")), "--seconds", "360"),
            *(*options, "--device", "cpu", "--out", folder),
        ],
        os.environ | {"TRITON_INTERPRET": "1", "TARFLOW_REHEARSAL": folder},
    )


def schedule(skip: list[str], seconds: float) -> dict[str, float]:
    """How many seconds each stage has, in proportion; smoke needs no more than it has by default."""
    parts = {name: stage.seconds for name, stage in STAGES.items() if name not in skip}
    first = {}
    if smoke := parts.pop("smoke", None):
        first["smoke"] = min(smoke, seconds * smoke / (smoke + sum(parts.values())))
        seconds -= first["smoke"]
    return first | {name: seconds * part / sum(parts.values()) for name, part in parts.items()}


def plan(skip: list[str], seconds: float) -> str:
    """Write the plan, a line for each stage.

    >>> print(plan(["check", "tune", "again", "profile"], 320))
    from    for
       0 s   90 s  smoke    every kernel once, against the formula; each in a process of its own
      90 s  230 s  rows     the rows of the targets: ops, trained sampling, training, large sampling; the rest
    """
    lines, begin = ["from    for"], 0.0
    for name, part in schedule(skip, seconds).items():
        lines.append(f"{begin:4.0f} s {part:4.0f} s  {name:8} {STAGES[name].what}")
        begin += part
    return "\n".join(lines)


def run_stages(run: stages.Run, skip: list[str], seconds: float) -> int:
    """Run the stages that are left, and keep how far each came."""
    print(f"{devices.describe(run.device)}\n{plan(skip, seconds)}", flush=True)
    done = _begin(run, skip)
    stages.compile_ahead(run, seconds)
    end = time.monotonic()
    for name, part in schedule(skip, seconds).items():
        end += part
        left = end - time.monotonic()
        if done.get(name) or left <= 0:
            print(f"== {name}: {'done before' if done.get(name) else 'no time left'}", flush=True)
            continue
        print(f"== {name}: at most {left:.0f} s", flush=True)
        try:
            done[name] = STAGES[name].run(run, left)
        except Exception:  # a mistake of ours in one stage is no reason to lose the others
            traceback.print_exc()
            done[name] = False
        run.keep(stages=done)
    print(f"results: {run.path}")
    return 0


def _begin(run: stages.Run, skip: list[str]) -> dict[str, bool]:
    """Return which stages are done, where the call goes on with what was found here at this commit."""
    results, machine = run.results(), devices.describe(run.device)
    if run.go_on and results.get("machine") == machine:
        stages.restore(results)
        return results.get("stages", {}) | ({"rows": False} if run.compiled or run.named else {})
    entries = {"smoke": "smoke", "check": "check", "tune": "tune", "profile": "profiles_machine"}
    run.keep(machine=machine, stages={}, **{entry: {} for name, entry in entries.items() if name not in skip})
    return {}


if __name__ == "__main__":
    sys.exit(main())
