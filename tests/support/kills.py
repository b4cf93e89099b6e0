"""Trains under torchrun while processes are killed, and compares the run with one that was left alone.

    python tests/support/kills.py --kills 20 --sharding full

One kill in two comes while a checkpoint is being written; the others at moments that are uniform from the start of a
try, so that they fall into the beginning, steps, and saves alike. After each, every checkpoint that was complete before
must still be there and be readable.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from tarflow.files import read_state
from tarflow.training import checkpoints

TRAINING = [
    *("--patch-size=7", "--channels=64", "--num-blocks=2", "--layers-per-block=1", "--guidance.weight=0"),
    *("--no-calibrate", "--device=cpu", "--precision=float32", "--batch-size=8", "--optimizer=adamw"),
    *("--log-every=1", "--checkpoint-every=2", "--keep-checkpoints=1000"),
]
PROCESSES = 2


def start(out, steps, sharding, restarts=0):
    """Start torchrun with a run of training; returns it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command = [f"--max-restarts={restarts}", "-m", "--", "tarflow", "train", f"--out={out}", *TRAINING]
    return subprocess.Popen(
        [*torchrun, *command, f"--max-steps={steps}", f"--sharding={sharding}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers(agent):
    """The numbers of the processes that torchrun has started."""
    children = [path.read_text().split() for path in Path(f"/proc/{agent.pid}/task").glob("*/children")]
    return [int(child) for part in children for child in part]


def half_written(saved):
    """The checkpoints that are being written, or that a process was writing when it was killed."""
    return [path for path in saved.glob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def kill_one(agent, draw, longest, saved):
    """Kill one of the processes: at a random moment or, as often, in a save; returns whether there was one."""
    while len(found := workers(agent)) < PROCESSES:
        if agent.poll() is not None:
            return False
        time.sleep(0.01)
    if draw.random() < 0.5:
        time.sleep(draw.uniform(0, longest))
    else:
        left = set(half_written(saved))
        while set(half_written(saved)) <= left and agent.poll() is None:
            time.sleep(0.0005)
    if agent.poll() is not None:
        return False
    try:
        os.kill(draw.choice(found), signal.SIGKILL)
    except ProcessLookupError:
        return False
    while set(found) & set(workers(agent)) and agent.poll() is None:
        time.sleep(0.01)
    return True


def check_readable(folder, before):
    """Assert that the checkpoints that there were are there and can be read; returns those that there are."""
    paths = checkpoints.checkpoints(folder)
    assert set(before) <= set(paths), f"lost: {set(before) - set(paths)}"
    for path in set(paths) - set(before):
        state = checkpoints.load_latest(folder) if path.is_dir() and path == paths[-1] else None
        state = read_state(path) if path.is_file() else state
        assert state is None or state["step"] == checkpoints.step_of(path)
    return paths


def run(folder, kills, sharding, steps, seed=0, longest=None):
    """Train twice, once with processes killed; asserts that both runs are equal, and counts where kills fell.

    A try is killed after so many seconds at most, by default less than half of what the undisturbed run takes.
    """
    draw, moments, known = random.Random(seed), Counter(), []
    undisturbed, began = start(folder / "undisturbed", steps, sharding), time.perf_counter()
    printed = undisturbed.communicate(timeout=600)[0]
    assert undisturbed.returncode == 0, printed
    if longest is None:
        longest = 0.4 * (time.perf_counter() - began)
    disturbed = start(folder / "disturbed", steps, sharding, restarts=kills)
    saved = folder / "disturbed" / "checkpoints"
    try:
        while sum(moments.values()) < kills and kill_one(disturbed, draw, longest, saved):
            progress = len(checkpoints.checkpoints(saved)) - len(known)
            moments["in a save" if half_written(saved) else "between saves" if progress else "before a save"] += 1
            known = check_readable(saved, known)
            print(f"killed {sum(moments.values())}, {len(known)} checkpoints", flush=True)
        printed = disturbed.communicate(timeout=600)[0]
    finally:
        disturbed.terminate()
    assert disturbed.returncode == 0, printed
    check_readable(saved, known)
    assert not half_written(saved)
    one, other = (load_file(folder / name / "model.safetensors") for name in ("undisturbed", "disturbed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    return moments


def cli():
    """Run the long form; prints where the kills fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--sharding", default="none")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moments = run(Path(folder), options.kills, options.sharding, options.steps, options.seed, longest=12.0)
    done = f"{sum(moments.values())} kills of a process: {', '.join(f'{n} {where}' for where, n in moments.items())}"
    print(f"{done}; no checkpoint was lost or broken, and the weights are those of the undisturbed run, to the bit")


if __name__ == "__main__":
    cli()
