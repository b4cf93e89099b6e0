"""A run that was killed, stopped or ran out of space goes on as if it had not been, or loses nothing."""

import errno
import gc
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.summary.writer import record_writer
from torch.testing import assert_close

from tarflow import FlowPPConfig, Guidance, TarFlow, TarFlowConfig, datasets
from tarflow.cli import main
from tarflow.cli.train import read_flags
from tarflow.decoding import calibration
from tarflow.files import atomic_write
from tarflow.pictures import Gallery
from tarflow.training import checkpoints
from tarflow.training.config import DataConfig, TrainConfig, TrainingConfig
from tarflow.training.folder import read_run
from tarflow.training.interruptions import TrainingDiverged, stop_signals
from tarflow.training.log import Log
from tarflow.training.presets import PRESETS
from tarflow.training.run import Run, train
from tarflow.training.trainer import MEASURES, Trainer

TRAIN = Path(__file__).parents[2] / "train.py"
# With a warm-up longer than any run, no learning rate depends on max_steps. So a run that is to be killed needs no end
# to race against, and is compared with one that ends a little after where it was killed.
TINY = {
    "patch_size": 7,
    "channels": 64,
    "num_blocks": 2,
    "layers_per_block": 1,
    "batch_size": 16,
    "device": "cpu",
    "optimizer": "adamw",
    "learning_rate": 1.0,
    "warmup_steps": 10_000,
    "max_steps": 1_000_000,
    "log_every": 1,
    "checkpoint_every": 5,
    "guidance.weight": 0.0,
    "importance_samples": 0,
}
OF_TARFLOW = ("patch_size", "channels", "num_blocks", "layers_per_block", "optimizer", "guidance.weight")
EXACTLY = {"rtol": 0, "atol": 0}


def flags(**settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def config_of(**settings):
    """The settings of a run with these flags."""
    command, _ = read_flags(flags(**settings))
    return command.config


def train_until(step, number, out, settings, whom=None):
    """``python train.py``, which gets a signal once that step is logged; returns its exit status and stderr.

    As a terminal does it, the whole group gets it, and so the processes that read pictures do; or ``whom`` picks one.
    """
    process = subprocess.Popen(
        [sys.executable, TRAIN, f"--out={out}", *flags(**settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while step not in losses(out):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, number) if whom is None else os.kill(whom(process.pid), number)
        errors = process.communicate(timeout=60)[1]
        return process.returncode, errors
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def losses(out):
    """By step; each at most once."""
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    pairs = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def newest(out):
    return checkpoints.load_latest(out / "checkpoints")


def assert_same_run(resumed, whole):
    assert losses(resumed) == losses(whole)
    assert_close(newest(resumed), newest(whole), **EXACTLY)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Settings of what there is to train: two precisions, another optimizer, a folder of pictures, another model."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(60):
        path = folder / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)
    return {
        "float32": {"precision": "float32"},
        "bfloat16": {"precision": "bfloat16"},
        "muon": {"optimizer": "muon", "precision": "float32"},
        "folder": {"dataset": "folder", "data_dir": folder, "image_size": 14},
        "Flow++": {
            "model": "flowpp",
            "filters": 8,
            "blocks_per_coupling": 1,
            "stack": "squeeze channel2",
            "dropout": 0.2,
        },
    }


@pytest.mark.parametrize(
    ("kind", "checkpoint_every"),
    [
        ("float32", 5),
        ("bfloat16", 5),
        ("muon", 5),
        ("folder", 5),
        ("Flow++", 5),
        pytest.param("float32", 1000, id="before its first checkpoint"),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, kinds, kind, checkpoint_every):
    settings = TINY | kinds[kind]
    if kind == "Flow++":
        settings = {name: value for name, value in settings.items() if name not in OF_TARFLOW}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    status, _ = train_until(7, signal.SIGKILL, killed, settings | {"checkpoint_every": checkpoint_every})
    assert status == -signal.SIGKILL
    steps = max(losses(killed)) + 3
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # as if it had been killed in the middle of a line
    assert main(["train", f"--resume={killed}", f"--max-steps={steps}"]) == 0
    train(config_of(**settings | {"max_steps": steps}), whole)
    assert_same_run(killed, whole)


def test_the_filter_that_resizes_a_folder_is_that_of_the_settings(tmp_path, kinds):
    settings = TINY | kinds["folder"] | {"max_steps": 1, "precision": "float32"}
    for resize in ("lanczos", "bilinear"):
        config = config_of(**settings, resize=resize)
        train(config, tmp_path / resize)
        data = datasets.load("folder", "train", config.data.data_dir, 14, resize)
        batch = next(datasets.batches(data, 16, config.training.seed, num_workers=0))
        loss = Trainer(config, data, torch.device("cpu")).train_step(*batch)["loss"]
        assert losses(tmp_path / resize) == {1: loss.item()}
    assert losses(tmp_path / "lanczos") != losses(tmp_path / "bilinear")
    with pytest.raises(ValueError, match=r"resize: .* expected 'lanczos' as in .*, got 'bilinear'"):
        train(config_of(**settings, resize="bilinear"), tmp_path / "lanczos", resume=True)


@pytest.mark.parametrize("preset", [name for name, config in PRESETS.items() if "fashion-mnist" not in name])
def test_a_preset_has_the_data_that_were_published(preset):
    data = PRESETS[preset].data
    if "starflow" in preset:
        assert data.dataset == "latents"
    elif data.conditional:
        assert (data.dataset, data.resize) == ("folder", "bilinear")
        assert data.image_size == int(re.search(r"\d+", preset)[0])
    else:
        assert data.dataset == ("cifar10" if "cifar10" in preset else f"{preset.partition('-')[0]}-2016")
    with pytest.raises(ValueError, match="data_dir: expected the folder that holds"):  # a dataset that there is
        datasets.load(data.dataset)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_a_stopped_run_saves_the_step_and_says_how_to_go_on(tmp_path, kinds, number):
    settings = TINY | kinds["folder"] | {"checkpoint_every": 1000}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    status, errors = train_until(3, number, stopped, settings)
    assert status == 130, errors
    step = newest(stopped)["step"]
    assert errors.splitlines()[-1] == f"tarflow train: stopped at step {step}; go on with --resume {stopped}"
    assert "Traceback" not in errors
    assert max(losses(stopped)) == step
    assert main(["train", f"--resume={stopped}", f"--max-steps={step + 3}"]) == 0
    train(config_of(**settings | {"max_steps": step + 3}), whole)
    assert_same_run(stopped, whole)


# A process that kills itself before one of its calls.
SUICIDE = """
import os, pathlib, signal, sys
from tarflow.cli import main
from tarflow.image_flow import ImageFlow
from tarflow.training import checkpoints, run, trainer
owner, name, number, *arguments = sys.argv[1:]
places = {"Run": run.Run, "Trainer": trainer.Trainer, "Path": pathlib.Path, "ImageFlow": ImageFlow}
place, left = places.get(owner, checkpoints), [int(number)]
original = getattr(place, name)

def counted(*args, **options):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)

setattr(place, name, counted)
main(arguments)
"""

UNEVEN = TINY | {"max_steps": 14, "log_every": 4, "evaluate_every": 5, "checkpoint_every": 5}


TIMES = ("images_per_second", "share_of_time")


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def half_written(out):
    return [path for path in out.rglob(".*") if path.name != ".lock"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A run that logs on other steps than it saves on."""
    out = tmp_path_factory.mktemp("uneven") / "run"
    train(config_of(**UNEVEN), out)
    return out


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        pytest.param("Trainer", "train_step", 12, id="between two rows, past a checkpoint"),
        pytest.param("checkpoints", "save", 2, id="past an evaluation, before its checkpoint"),
        pytest.param("ImageFlow", "save_weights", 2, id="past a checkpoint, before the weights"),
        pytest.param("Path", "replace", 4, id="while a checkpoint is written"),
        pytest.param("Run", "evaluate", 3, id="before the last evaluation"),
        pytest.param("Run", "sample", 1, id="past the last evaluation"),
    ],
)
def test_a_run_that_is_killed_logs_what_it_would_have_logged(tmp_path, uneven, owner, name, number):
    out = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", SUICIDE, owner, name, str(number), "train", f"--out={out}", *flags(**UNEVEN)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(["train", f"--resume={out}"]) == 0
    assert metrics(out) == metrics(uneven)
    assert_same_run(out, uneven)
    assert half_written(out) == []


def test_a_run_that_is_stopped_at_its_early_evaluation_logs_it_once(tmp_path):
    """It is repeated by the run that goes on."""
    settings = TINY | {"max_steps": 6, "checkpoint_every": 2, "evaluate_every": 8, "sample_every": 1000}
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(config_of(**settings), whole)
    train(config_of(**settings | {"max_steps": 2}), out)
    assert main(["train", f"--resume={out}", "--max-steps=6"]) == 0
    assert [row["step"] for row in metrics(whole) if "eval_bits_per_dim" in row] == [2, 6]
    assert metrics(out) == metrics(whole)


def test_pictures_come_early_and_then_as_often_as_told(tmp_path, monkeypatch, capsys):
    drawn, settings = [], TINY | {"max_steps": 20, "sample_every": 8}
    monkeypatch.setattr(Gallery, "save_samples", lambda gallery, model, path, title: drawn.append(title) or save(path))
    save = Image.new("RGB", (2, 2)).save
    train(config_of(**settings), tmp_path / "run")
    assert drawn == [f"Samples after {step} steps" for step in (2, 8, 16, 20)]
    path = tmp_path / "run" / "samples.png"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("drew")]
    assert lines == [f"drew    {path} after {step} steps" for step in (2, 8, 16, 20)]


def test_the_time_left_is_what_the_run_then_takes(tmp_path, monkeypatch):
    """A clock that only work moves: the first row takes long, and the estimate is right once all work was seen."""
    now, left, finished = [0.0], {}, []

    def takes(seconds, of):
        def work(*args, **options):
            now[0] += seconds(args[0]) if callable(seconds) else seconds
            return of(*args, **options)

        return work

    monkeypatch.setattr("tarflow.training.log.time", SimpleNamespace(perf_counter=lambda: now[0]))
    train_step = takes(lambda trainer: 2.0 if trainer.step else 50.0, Trainer.train_step)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    for name, seconds in (("evaluate", 7.0), ("sample", 11.0), ("save", 3.0)):
        monkeypatch.setattr(Run, name, takes(seconds, lambda *args: None))
    monkeypatch.setattr(Gallery, "save_trajectory", lambda *args: finished.append(now[0]))
    add = Log.add

    def note(log, step, *args):
        result = add(log, step, *args)
        left[step] = log.seconds_left(step), now[0]
        return result

    monkeypatch.setattr(Log, "add", note)
    often = {"evaluate_every": 8, "sample_every": 12, "checkpoint_every": 5}
    train(config_of(**TINY | often | {"max_steps": 30}), tmp_path / "run")
    assert left[1] == (50.0 * 29, 50.0)
    assert left[2][0] == 2.0 * 28
    for step in range(6, 31):  # at which an evaluation, a picture and a checkpoint have been made
        estimate, at = left[step]
        assert estimate == pytest.approx(finished[0] - at), step


def test_measures_of_a_checkpoint_go_to_the_device_that_trains(tmp_path):
    log = Log(tmp_path, TrainingConfig(), torch.device("meta"), PRESETS["fashion-mnist"].model)
    log.load_state_dict({name: torch.zeros(7) for name in MEASURES})  # as a checkpoint is read, to the CPU
    assert len(log.pending) == 7
    assert {measure.device.type for row in log.pending for measure in row.values()} == {"meta"}


@pytest.mark.parametrize(("hours", "seconds"), [(0.1, 20.0), (10, 360.0)])
def test_decoders_are_timed_for_seconds_or_for_a_hundredth_of_a_long_training(tmp_path, monkeypatch, hours, seconds):
    given = {}
    monkeypatch.setattr(Log, "elapsed", hours * 3600)
    timed = [calibration.Timing("cpu", "float32", 2, 1, "sequential", None, 3, 0.1)]
    monkeypatch.setattr(calibration, "calibrate", lambda flow, guidance, **options: given.update(options) or timed)
    train(config_of(**TINY | {"max_steps": 1}), tmp_path / "run")
    assert given == {"batches": {1, 6, 80}, "rounds": 1, "seconds": seconds, "noise_level": None}


def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path, uneven):
    out = Path(shutil.copytree(uneven, tmp_path / "run"))
    assert main(["train", f"--resume={out}"]) == 0
    assert (out / "metrics.jsonl").read_text() == (uneven / "metrics.jsonl").read_text()
    assert_same_run(out, uneven)


def test_a_run_that_is_made_longer_logs_as_if_it_had_always_been(tmp_path, uneven):
    out = tmp_path / "run"
    train(config_of(**UNEVEN | {"max_steps": 10}), out)
    assert main(["train", f"--resume={out}", "--max-steps=14"]) == 0
    assert metrics(out) == metrics(uneven)


def test_what_killed_runs_left_half_written_is_removed_and_nothing_else(run):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [".model.safetensors.{}", ".metrics.jsonl.{}", "checkpoints/.step-00000009.pt.{}", ".notes.{}"]
    dead, living, own = ([run / name.format(process) for name in names] for process in (ended.pid, 1, os.getpid()))
    others = [run / ".hidden", run / "checkpoints" / "notes"]
    for path in (*dead, *living, *own, *others):
        path.write_text("half")
    assert main(["train", f"--resume={run}", "--max-steps=7"]) == 0
    left = [path for path in (*dead, *living, *own, *others) if path.exists()]
    assert left == [dead[-1], *living, own[-1], *others]


def test_copies_of_checkpoints_are_neither_counted_nor_deleted_nor_resumed(run):
    folder = run / "checkpoints"
    copies = [folder / name for name in ("step-best-a.pt", "step-best-b.pt", "step-00000009-copy.pt")]
    for path in copies:
        shutil.copy(folder / "step-00000004.pt", path)
    assert main(["train", f"--resume={run}", "--max-steps=8"]) == 0
    assert sorted(folder.glob("*.pt")) == sorted([folder / "step-00000006.pt", folder / "step-00000008.pt", *copies])


def readers(process):
    """The processes that it has started."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the readers in /proc")
def test_a_run_whose_reader_is_killed_saves_the_step_and_ends_in_one_line(tmp_path, kinds):
    settings = TINY | kinds["folder"] | {"checkpoint_every": 1000}
    out, whole = tmp_path / "run", tmp_path / "whole"
    status, errors = train_until(3, signal.SIGKILL, out, settings, whom=lambda process: readers(process)[0])
    lines = [line for line in errors.splitlines() if line and "%|" not in line]  # but the progress bar
    assert status == 1, errors
    assert [line.partition(", ")[0] for line in lines] == [
        "tarflow train: error: a process that reads images was killed"
    ]
    step = newest(out)["step"]
    assert max(losses(out)) == step >= 3
    assert main(["train", f"--resume={out}", f"--max-steps={step + 3}"]) == 0
    train(config_of(**settings | {"max_steps": step + 3}), whole)
    assert_same_run(out, whole)


def test_readers_end_with_their_run(tmp_path, kinds):
    gc.disable()
    try:
        train(config_of(**TINY | kinds["folder"] | {"max_steps": 2}), tmp_path / "run")
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path, kinds, monkeypatch, capsys):
    pictures, out = Path(shutil.copytree(kinds["folder"]["data_dir"], tmp_path / "pictures")), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    train(config_of(**TINY | kinds["folder"] | {"data_dir": Path("pictures"), "max_steps": 2}), out)
    kept_data = json.loads((out / "config.json").read_text())["data"]
    assert sum(kept_data[split]["images"] for split in ("train", "test")) == 60
    assert {data["classes"] for data in kept_data.values()} == {2}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", f"--resume={out}", "--max-steps=3"]) == 0
    before = kept(out)
    for path in pictures.rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"more")
    capsys.readouterr()
    assert main(["train", f"--resume={out}", "--max-steps=4"]) == 1
    message = r"tarflow train: error: data_dir: expected the train images that .*/run was begun with, .*; got .*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    assert kept(out) == before
    moved = ["--dataset=folder", f"--data-dir={kinds['folder']['data_dir']}"]
    assert main(["train", f"--resume={out}", "--max-steps=4", *moved]) == 0


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print(flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_trains_in_is_refused(run, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    holder.stdout.readline()
    before = kept(run)
    try:
        assert main(["train", f"--resume={run}", "--max-steps=9"]) == 1
    finally:
        holder.communicate()
    error = f"tarflow train: error: out: another process trains in {run}; choose another folder\n"
    assert capsys.readouterr().err == error
    assert kept(run) == before
    assert main(["train", f"--resume={run}", "--max-steps=7"]) == 0


def test_a_run_holds_its_folder_from_before_it_reads_data(tmp_path, monkeypatch):
    out, load, refused = tmp_path / "run", datasets.load, []

    def check(*arguments, **options):
        other = subprocess.run(
            [sys.executable, "-c", HOLD, out / ".lock"], stdin=subprocess.DEVNULL, capture_output=True
        )
        refused.append(b"BlockingIOError" in other.stderr)
        return load(*arguments, **options)

    monkeypatch.setattr(datasets, "load", check)
    train(config_of(**TINY | {"max_steps": 1}), out)
    assert refused == [True, True]


OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("again", ["out", "resume"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_a_run_without_memory_says_so_and_its_folder_can_be_trained_in(tmp_path, monkeypatch, capsys, error, again):
    out, step = tmp_path / "run", Trainer.train_step

    def fail(trainer, *batch):
        if trainer.step:
            raise error
        return step(trainer, *batch)

    settings = TINY | {"max_steps": 2}
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", fail)
        assert main(["train", f"--out={out}", *flags(**settings)]) == 1
    message = "tarflow train: error: batch_size: expected steps that fit in memory; 16 images of this model do not"
    assert [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line] == [message]
    assert main(["train", f"--{again}={out}", *flags(**settings | {"batch_size": 8})]) == 0
    assert list(losses(out)) == [1, 2]


def test_a_second_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted_twice(arguments):
        with stop_signals():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    def interrupted(arguments):
        raise KeyboardInterrupt

    for command, line in ((interrupted_twice, "interrupted at once"), (interrupted, "interrupted")):
        monkeypatch.setattr("tarflow.cli.train.run", command)
        assert main(["train"]) == 130
        assert capsys.readouterr().err == f"tarflow train: {line}\n"


# Interrupts itself when it begins to import tarflow, which takes seconds. A job that a script runs in the background
# ignores interrupts, and so would this process, which would train.
IMPATIENT = """
import os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "tarflow":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_interrupt_in_the_first_seconds_is_one_line():
    ended = subprocess.run([sys.executable, "-c", IMPATIENT, TRAIN], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "tarflow: interrupted\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps, with checkpoints at the last two multiples of two."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = config_of(**TINY | {"max_steps": 6, "checkpoint_every": 2, "keep_checkpoints": 2})
    train(replace(config, training=replace(config.training, denoising_steps=None)), out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to do harm to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def kept(run):
    """All that a later failure may not touch."""
    return {path.name: path.read_bytes() for path in (*run.glob("checkpoints/*"), run / "model.safetensors")}


def test_the_last_checkpoints_are_kept(finished):
    assert [path.name for path in checkpoints.checkpoints(finished / "checkpoints")] == [
        "step-00000004.pt",
        "step-00000006.pt",
    ]
    assert newest(finished)["step"] == 6


def truncate(run):
    path = run / "checkpoints" / "step-00000006.pt"
    path.write_bytes(path.read_bytes()[:-1000])


def damage(run):
    path = run / "checkpoints" / "step-00000006.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty_the_last(run):
    (run / "checkpoints" / "step-00000004.pt").unlink()
    (run / "checkpoints" / "step-00000006.pt").write_bytes(b"")


CORRUPT = r"resume: .*/step-00000006\.pt is truncated or corrupt"
REFUSED = {
    "out holds a run": (None, ["--out={run}", "--max-steps=1"], r"out: .*/run already holds a run; .* or --resume it"),
    "another width": (None, ["--resume={run}", "--channels=128"], "channels: .* expected 64 as in .*/run, got 128"),
    "another seed": (None, ["--resume={run}", "--seed=1"], "seed: .* expected 0 .* got 1"),
    "another optimizer": (None, ["--resume={run}", "--optimizer=muon"], "optimizer: .* expected 'adamw' .* got 'muon'"),
    "truncated": (truncate, ["--resume={run}"], rf"{CORRUPT}; delete it to go on from step-00000004\.pt"),
    "damaged": (damage, ["--resume={run}"], CORRUPT),
    "empty and the only one": (empty_the_last, ["--resume={run}"], f"{CORRUPT}; there is none before it"),
    "resumed into another folder": (None, ["--resume={run}", "--out=other"], "out: expected no folder besides that of"),
}


@pytest.mark.parametrize(("harm", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_go_on_is_refused_in_one_line(run, capsys, harm, arguments, message):
    if harm:
        harm(run)
    before = kept(run)
    assert main(["train", *(argument.format(run=run) for argument in arguments)]) == 1
    assert re.fullmatch(f"tarflow train: error: {message}.*\n", capsys.readouterr().err)
    assert kept(run) == before


BAD_SETTINGS = {
    **dict.fromkeys(("max_steps", "batch_size", "learning_rate", "gradient_clip", "log_every", "evaluate_every"), 0),
    **dict.fromkeys(("sigma", "weight_decay", "warmup_steps", "seed", "label_drop", "ema_decay"), -1),
    **{"checkpoint_every": -5, "keep_checkpoints": 0, "max_bad_steps": math.nan},
}


@pytest.mark.parametrize(
    ("name", "value"), [*BAD_SETTINGS.items(), ("label_drop", 1.0), ("ema_decay", 1.0), ("seed", True)]
)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected an? (number|integer) .*; got {value}$"):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, field.name) for kind in (DataConfig, TrainingConfig) for field in fields(kind)]
)
def test_a_setting_of_another_kind_is_named(kind, name):
    """Someone may have edited ``config.json``."""
    for value in ([], ["odd"], [1]):
        with pytest.raises(ValueError, match=f"^{name}: expected .*; got "):
            kind(**{name: value})


def test_gaussian_noise_of_no_size_is_refused():
    """Levels of grey alone have densities without bound, and samples of them would be rounded as if they had bins."""
    with pytest.raises(ValueError, match=r"^sigma: expected more than 0 with Gaussian noise"):
        TrainingConfig(sigma=0.0)
    assert TrainingConfig(sigma=0.0, noise="uniform").noise_sigma == 0


@pytest.mark.parametrize(
    ("conditional", "guidance", "expected"),
    [
        (True, Guidance(), Guidance(2.0)),
        (True, Guidance(1.5), Guidance(1.5)),
        (True, Guidance(0.0), None),
        (False, Guidance(), None),
        (False, Guidance(3.0), None),
        (False, Guidance(0.0), None),
        (False, Guidance(0.2, temperature=1.5), Guidance(0.2, temperature=1.5)),
        (True, Guidance(1.0, "constant", parameters="mu"), Guidance(1.0, "constant", parameters="mu")),
    ],
    ids=str,
)
def test_samples_in_training_are_guided_as_told_and_without_labels_by_temperature_alone(
    conditional, guidance, expected, tmp_path, monkeypatch
):
    model = TarFlowConfig(patch_size=7, channels=64, num_blocks=2, layers_per_block=1)
    settings = TrainingConfig(max_steps=1, device="cpu", guidance=guidance)
    drawn = []
    monkeypatch.setattr(Gallery, "save_samples", lambda gallery, *_: drawn.append(gallery.guidance))
    monkeypatch.setattr(Gallery, "save_trajectory", lambda gallery, *_: None)
    monkeypatch.setattr(
        Run, "sample", lambda run: run.gallery.save_samples(run.trainer.average, tmp_path / "s.png", "")
    )
    train(TrainConfig(DataConfig(conditional=conditional), model, settings), tmp_path / "run")
    assert drawn == [expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((DataConfig(), TarFlowConfig(), Guidance(drop_label=False)), "^guidance: the reference branch equals the"),
        (
            (DataConfig(), TarFlowConfig(coupling="mixture"), Guidance(parameters="mu")),
            "^parameters: expected both with a mixture",
        ),
        (
            (DataConfig(conditional=False), FlowPPConfig(), Guidance(temperature=2.0)),
            "^guidance: expected weight 0 for flowpp",
        ),
    ],
    ids=["label kept", "part of a mixture", "Flow++"],
)
def test_guidance_that_can_have_no_effect_is_refused(settings, message):
    data, model, guidance = settings
    with pytest.raises(ValueError, match=message):
        TrainConfig(data, model, TrainingConfig(noise="uniform", guidance=guidance))


def test_muon_is_refused_where_there_are_no_transformers():
    with pytest.raises(ValueError, match="optimizer: expected adamw for flowpp"):
        TrainConfig(DataConfig(conditional=False), FlowPPConfig(), TrainingConfig(noise="uniform", optimizer="muon"))


GUIDED = {
    "--guidance 3": Guidance(3.0),
    "--guidance=3": Guidance(3.0),
    "--guidance 3 --guidance.schedule constant": Guidance(3.0, "constant"),
    "--no-conditional --guidance.temperature=1.5 --guidance.no-drop-label": Guidance(
        3.0, "linear", 1.5, drop_label=False
    ),
    "--no-conditional": None,
    "--no-conditional --guidance 0": None,
}


@pytest.mark.parametrize(("arguments", "expected"), GUIDED.items())
def test_flags_tell_the_guidance_of_the_samples(arguments, expected, monkeypatch, tmp_path):
    seen = []

    def train(config, out, resume):
        seen.append(config.sample_guidance)
        return TarFlow(TarFlowConfig())

    monkeypatch.setattr("tarflow.cli.train.train", train)
    assert main(["train", *arguments.split(), f"--out={tmp_path / 'run'}"]) == 0
    assert seen == [expected]


@pytest.mark.parametrize("arguments", ["--guidance 2", "--guidance=3"])
def test_guidance_by_labels_that_there_are_not_is_refused_if_asked_for(arguments, tmp_path, capsys):
    assert main(["train", "--no-conditional", *arguments.split(), f"--out={tmp_path / 'run'}"]) == 1
    assert "guidance: the reference branch equals the conditional one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "arguments", "expected"),
    [
        (asdict(Guidance(1.0, "constant", 1.5)), [], Guidance(1.0, "constant", 1.5)),
        (asdict(Guidance(1.0, "constant", 1.5)), ["--guidance=3"], Guidance(3.0, "constant", 1.5)),
        (asdict(Guidance(1.0)), ["--temperature=0.5"], Guidance(1.0, temperature=0.5)),
        (asdict(Guidance(0.0)), [], Guidance(0.0)),
    ],
)
def test_decoders_are_timed_under_the_guidance_of_the_run(run, monkeypatch, kept, arguments, expected):
    path = run / "config.json"
    settings = json.loads(path.read_text())
    settings["train"]["training"]["guidance"] = kept
    path.write_text(json.dumps(settings))
    seen = []
    monkeypatch.setattr(calibration, "calibrate", lambda flow, guidance, *_, **__: seen.append(guidance) or [])
    assert main(["calibrate", str(run), "--device=cpu", *arguments]) == 0
    assert seen == [expected]


FLAT = """
{"dataset": "fashion-mnist", "data_dir": null, "image_size": null, "resize": "lanczos", "flip": null,
 "conditional": true, "model": "tarflow", "coupling": "affine", "num_mixtures": 8, "patch_size": 7, "channels": 64,
 "num_blocks": 2, "layers_per_block": 1, "head_dim": 64, "expansion": 4, "volume_preserving": false,
 "stack": "squeeze stripe4 channel4", "filters": 32, "blocks_per_coupling": 2, "attention": "softmax",
 "pointwise": true, "elu_output": false, "weight_norm": false, "dropout": 0.0, "noise": "gaussian",
 "dequantizer": {"coupling": "mixture", "num_mixtures": 8, "filters": 16, "blocks_per_coupling": 1,
  "attention": "none", "pointwise": true, "elu_output": false, "weight_norm": false, "dropout": 0.0,
  "stack": "stripe4", "context_filters": 16, "context_blocks": 1, "context_norm": false, "context_attention": "none"},
 "sigma": 0.1, "label_drop": 0.1, "max_steps": 6, "batch_size": 16, "learning_rate": 1.0, "min_learning_rate": 1e-06,
 "warmup_steps": 10000, "schedule": "cosine", "loss_per": "dimension", "beta2": 0.95, "weight_decay": 0.0001,
 "gradient_clip": 1.0, "ema_decay": 0.999, "precision": "auto", "compile": false, "max_bad_steps": 20, "seed": 0,
 "device": "cpu", "log_every": 1, "evaluate_every": 500, "sample_every": 500, "checkpoint_every": 2,
 "keep_checkpoints": 2, "score_draws": 0, "guidance": {"weight": 0.0, "schedule": "linear", "temperature": 1.0,
  "parameters": "both", "drop_label": true}}
"""


def write_flat(run, **changes):
    """The settings of the fixture's run as they were written before they were nested; the other files are the same."""
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train": json.loads(FLAT) | changes}))


def test_a_run_of_the_last_release_goes_on_and_is_scored(run, tmp_path):
    before, whole = read_run(run), Path(shutil.copytree(run, tmp_path / "whole"))
    write_flat(run)
    assert read_run(run) == before
    assert main(["evaluate", str(run), "--num-images=4", "--draws=1", "--device=cpu"]) == 0
    for folder in (run, whole):
        assert main(["train", f"--resume={folder}", "--max-steps=9"]) == 0
    assert_same_run(run, whole)
    assert set(json.loads((run / "config.json").read_text())["train"]) == {"data", "training"}


def test_settings_that_an_old_run_does_not_tell_have_their_defaults(run):
    settings = json.loads(FLAT)
    for name in ("dequantizer", "guidance", "score_draws", "loss_per"):
        del settings[name]
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train": settings}))
    training = read_run(run).training
    assert (training.guidance, training.importance_samples, training.loss_per) == (Guidance(), 8, "dimension")


@pytest.mark.parametrize(("conditional", "weight"), [(True, 1.5), (False, 1.5), (False, 2.0)])
def test_a_run_from_when_guidance_was_a_number_goes_on(run, conditional, weight):
    write_flat(run, conditional=conditional, guidance=weight)
    assert read_run(run).sample_guidance == (Guidance(weight) if conditional else None)


@pytest.mark.parametrize("data", [5, {"train": 5}, {"train": {"digest": None}}, {"train": {"digest": "0"}, "test": []}])
def test_data_that_are_recorded_wrongly_are_one_line(run, data, capsys):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": data}))
    for command in (["train", f"--resume={run}", "--max-steps=12"], ["evaluate", str(run), "--device=cpu"]):
        assert main(command) == 1
        assert "error: config.json: data: expected source, images, classes, digest of" in capsys.readouterr().err


@contextmanager
def no_file_beyond(size):
    """What a full disk looks like to whoever writes a longer file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_without_space_for_its_checkpoint_says_so_and_loses_nothing(run, capsys):
    before = kept(run)
    with no_file_beyond(1_000_000):
        assert main(["train", f"--resume={run}", "--max-steps=12"]) == 1
    errors = capsys.readouterr().err
    message = f"no space left to write {run}/checkpoints/step-00000008.pt; what was there before is unchanged"
    assert errors.splitlines()[-1].endswith(message)
    assert "Traceback" not in errors
    assert kept(run) == before
    assert main(["train", f"--resume={run}", "--max-steps=8"]) == 0


def test_events_without_space_are_one_line(run, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = kept(run)
    monkeypatch.setattr(record_writer.RecordWriter, "write", refuse)
    assert main(["train", f"--resume={run}", "--max-steps=12"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    message = f"no space left to write {run}; what was there before is unchanged"
    assert errors == [f"tarflow train: error: [Errno {errno.ENOSPC}] {message}"]
    assert kept(run) == before


def test_without_tensorboard_a_run_has_its_metrics_alone(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    events = {path: path.read_bytes() for path in run.glob("events.*")}
    assert main(["train", f"--resume={run}", "--max-steps=9"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 9
    assert {path: path.read_bytes() for path in run.glob("events.*")} == events != {}


def test_weights_without_space_say_so_and_lose_nothing(run):
    before = kept(run)
    with no_file_beyond(1000), pytest.raises(OSError, match=r"no space left to write .*/model\.safetensors"):
        TarFlow.from_pretrained(run).save_pretrained(run)
    assert kept(run) == before


def test_weights_are_as_readable_as_the_other_files(finished):
    modes = {(finished / name).stat().st_mode for name in ("model.safetensors", "config.json", "metrics.jsonl")}
    assert len(modes) == 1


def write_half(path, error):
    with atomic_write(path) as beside:
        beside.write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError("broken"), ValueError("bad"), KeyboardInterrupt()], ids=repr)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "file"
    for text in ("old", "new"):
        with atomic_write(path) as beside:
            beside.write_text(text)
        assert path.read_text() == text
    with pytest.raises(type(error)):
        write_half(path, error)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_diverges_gives_up_and_leaves_its_checkpoints(run):
    before = kept(run)
    hopeless = TINY | {"learning_rate": 1e35, "max_bad_steps": 4, "checkpoint_every": 1000}
    with pytest.raises(
        TrainingDiverged, match=r"the last 4 steps had a loss or gradient that is not finite.* below 1e\+35"
    ):
        train(config_of(**hopeless), run, resume=True)
    assert kept(run) == before
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["bad_in_a_row"] for row in rows[-4:]] == [1, 2, 3, 4]


def test_steps_that_are_not_finite_push_no_checkpoint_out(run):
    hopeless = TINY | {"learning_rate": 1e35, "max_bad_steps": 4, "checkpoint_every": 1, "keep_checkpoints": 2}
    # The step before the first bad one is finite, if only just.
    with pytest.raises(TrainingDiverged, match=r"; checkpoints from before them: 6, 7$"):
        train(config_of(**hopeless), run, resume=True)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(run / "checkpoints")] == [6, 7]


def resave(run, change):
    path = run / "checkpoints" / "step-00000006.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)


CRAFTED = {
    "moment": (
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(3, 3)),
        "state.optimizer.state.0",
    ),
    "missing": (lambda state: state.pop("average"), "state: expected a part average"),
    "measures": (
        lambda state: state.update(measures={"loss": 3}),
        r"state\.measures: expected a tensor \(n,\) for each",
    ),
}


@pytest.mark.parametrize(("change", "message"), CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_checkpoint_is_refused_in_one_line(run, capsys, change, message):
    resave(run, change)
    before = kept(run)
    assert main(["train", f"--resume={run}", "--max-steps=9"]) == 1
    message = rf"tarflow train: error: resume: .*/step-00000006\.pt is no checkpoint of this run; {message}.*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    assert kept(run) == before


def test_a_checkpoint_without_measures_goes_on(run):
    resave(run, lambda state: state.pop("measures"))
    assert main(["train", f"--resume={run}", "--max-steps=7"]) == 0


def test_weights_without_a_checkpoint_are_not_trained_over(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert main(["train", f"--resume={run}", "--max-steps=9"]) == 1
    assert f"resume: expected a checkpoint in {run}/checkpoints; got none" in capsys.readouterr().err
