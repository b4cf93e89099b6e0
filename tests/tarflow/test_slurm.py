"""The script for Slurm trains, stops with a checkpoint when its time is up, asks for another job, and goes on in it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tarflow.training import checkpoints

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"
TRAINING = (
    "--patch-size=7 --channels=64 --num-blocks=1 --layers-per-block=1 --guidance.weight=0 --no-calibrate --device=cpu "
    "--precision=float32 --batch-size=8 --checkpoint-every=1000000"
)
# What the script asks Slurm for: to start a process on each machine, here on this one, and to be started again.
STUBS = {
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> "$REQUEUED"; else echo localhost; fi',
    "torchrun": 'exec python -m torch.distributed.run --local-addr localhost "$@"',
}


@pytest.fixture
def environment(tmp_path):
    for name, body in STUBS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    slurm |= {"SLURM_JOB_ID": str(os.getpid()), "REQUEUED": str(tmp_path / "requeued"), "OMP_NUM_THREADS": "1"}
    return os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def submit(out, steps, environment):
    return subprocess.Popen(
        ["bash", SCRIPT, *TRAINING.split(), f"--out={out}", f"--max-steps={steps}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_a_job_whose_time_is_up_goes_on_in_another(environment, tmp_path):
    out, requeued = tmp_path / "run", tmp_path / "requeued"
    first = submit(out, 1_000_000, environment)
    while not (out / "metrics.jsonl").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    printed, _ = first.communicate(timeout=120)
    assert first.returncode == 0, printed
    assert requeued.read_text() == f"{os.getpid()}\n"
    (saved,) = checkpoints.checkpoints(out / "checkpoints")
    step = checkpoints.step_of(saved)
    assert f"stopped at step {step}" in printed
    second = submit(out, step + 2, environment)
    printed, _ = second.communicate(timeout=120)
    assert second.returncode == 0, printed
    assert f"steps {step} to {step + 2}" in printed
    assert requeued.read_text() == f"{os.getpid()}\n"  # not again: it is done
