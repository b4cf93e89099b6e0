"""A program for torchrun: runs commands of tarflow one after the other, some of them with a process that misbehaves.

``several.py JOBS.json``: a list of ``{"name", "command", "harm"}``, where ``harm`` is a function below, or none. Each
process appends the name and the status of each command to ``JOBS.<rank>``.
"""

import contextlib
import errno
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import FileSystemWriter

from tarflow import TarFlow, datasets, processes
from tarflow.cli import main, shards
from tarflow.training.run import Run
from tarflow.training.trainer import Trainer

torch.set_num_threads(1)
shards.SHARD_SIZE = 50  # small files
# What torchrun sets; without it this file is only looked at, for examples in docstrings.
RANK = int(os.environ.get("RANK", 0))
IS_FIRST_TRY = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
write_data, prepare, train_step = FileSystemWriter.write_data, Trainer.prepare, Trainer.train_step
draw = TarFlow.sample


def in_one(owner, name, harmed):
    """Have a method, called in the last process, do something else."""
    return patch.object(owner, name, harmed) if in_last() else contextlib.nullcontext()


def nan(step=6):
    """The images of a step are not numbers."""

    def harmed(trainer, *arguments):
        x, *others = prepare(trainer, *arguments)
        return x * math.nan if trainer.step == step else x, *others

    return in_one(Trainer, "prepare", harmed)


def stop(number=signal.SIGTERM, step=7):
    """The process gets a signal."""

    def harmed(trainer, *batch):
        if trainer.step == step - 1:
            os.kill(os.getpid(), number)
        return train_step(trainer, *batch)

    return in_one(Trainer, "train_step", harmed)


def interrupt():
    """The process gets Ctrl-C."""
    return stop(signal.SIGINT)


def unreadable():
    """The process cannot read the data."""

    def harmed(*arguments):
        raise ValueError("data_dir: expected the folder that holds the data; got none")

    return in_one(datasets, "load", harmed)


def full_disk():
    """The process has no space for its shards."""

    def harmed(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return in_one(FileSystemWriter, "write_data", harmed)


def bad_samples():
    """The process draws an image that is not finite, in its first file."""

    def harmed(model, *arguments, **options):
        images = draw(model, *arguments, **options)
        images[-1] = math.nan
        return images

    return in_one(TarFlow, "sample", harmed)


def unshared():
    """The process finds no checkpoint, as in a folder of its own."""
    return in_one(Run, "resume", lambda run: None)


def die_in_a_save(number=2):
    """The process is killed while it writes its shards for the second time."""
    left = [number]

    def harmed(writer, *arguments):
        left[0] -= 1
        if not left[0] and IS_FIRST_TRY:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_data(writer, *arguments)

    return in_one(FileSystemWriter, "write_data", harmed)


def other_code():
    """The process runs another version of the code."""
    return in_one(processes, "_code", lambda: "another")


def late():
    """The process does not begin."""
    if in_last():
        time.sleep(600)
    return patch.object(processes, "START", timedelta(seconds=8))


def run(jobs):
    """Run the commands; returns the status of the last."""
    for job in json.loads(jobs.read_text()):
        with globals()[job["harm"]]() if "harm" in job else contextlib.nullcontext():
            command = [*job["command"], *job.get("of_the_last", [])] if in_last() else job["command"]
            status = main(command)
        with jobs.with_suffix(f".{RANK}").open("a") as file:
            file.write(json.dumps([job["name"], status]) + "\n")
    return status


def in_last():
    """Whether this is the last process."""
    return int(os.environ["WORLD_SIZE"]) == RANK + 1


if __name__ == "__main__":
    path = Path(sys.argv[1])
    alone = path.name.startswith("alone")  # the processes have to connect by themselves, or do not even do so
    with contextlib.nullcontext() if alone else processes.connected("cpu"):
        status = run(path)
    sys.exit(status if alone else 0)
