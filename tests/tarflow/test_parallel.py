"""A run is the same on one device and on several, however its weights are shared; and one that fails, fails whole."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser
from torch.testing import assert_close

from tarflow import TarFlow, TarFlowConfig
from tarflow.cli import main, shards
from tarflow.training import checkpoints, parallel
from tarflow.training.config import TrainingConfig

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "support" / "several.py"
TARFLOW = {"patch_size": 7, "channels": 64, "num_blocks": 2, "layers_per_block": 1, "guidance.weight": 0.0}
TARFLOW |= {"no_calibrate": None, "optimizer": "adamw", "learning_rate": 1e-3}
FLOWPP = {"model": "flowpp", "filters": 8, "blocks_per_coupling": 1, "stack": "squeeze channel2"}
FLOWPP |= {"importance_samples": 1, "learning_rate": 1e-3}
VOLUME_PRESERVING = TARFLOW | {"volume_preserving": None, "noise": "uniform"}
MUON = TARFLOW | {"optimizer": "muon", "noise": "variational"}
COMMON = {"batch_size": 16, "device": "cpu", "precision": "float32", "schedule": "constant", "warmup_steps": 5}
COMMON |= {"max_steps": 20, "log_every": 1, "checkpoint_every": 8}
COMMUNICATION = "share_of_time_in_communication"
FULL, ACCUMULATE = {"sharding": "full"}, {"accumulate": 4}


def train(out, *settings, **more):
    """The arguments of ``tarflow train``."""
    told = COMMON | {name: value for part in settings for name, value in part.items()} | more
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in told.items()]
    where = "resume" if "resume" in told else "out"
    return ["train", *([f"--out={out}"] if where == "out" else []), *(f if v is None else f"{f}={v}" for f, v in flags)]


def sample(folder, out):
    """The arguments of ``tarflow sample``, for three files of images."""
    return ["sample", str(folder / "one"), f"--out={folder / out}", "--num=120", "--device=cpu", "--sigma=0"]


def evaluate(folder, name):
    """The arguments of ``tarflow evaluate``, for 5 batches of samples, 3 of test images and 13 of training images."""
    flags = ["--samples=70", "--guidance=1", "--num-images=42", "--importance-samples=2", "--batch-size=16"]
    return ["evaluate", str(folder / name), f"--data-dir={folder / 'few'}", *flags, "--device=cpu"]


def write_few_images(folder):
    """The files of Fashion-MNIST, with few images of noise."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for prefix, size in ("train", 201), ("t10k", 60):
        for kind, shape, most in ("images-idx3", (size, 28, 28), 256), ("labels-idx1", (size,), 10):
            header = bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes()
            path = folder / f"{prefix}-{kind}-ubyte"
            path.write_bytes(header + draw.integers(0, most, shape, np.uint8).tobytes())


def torchrun(jobs, processes, *options):
    """Start torchrun, which runs the jobs in so many processes; returns it."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *options]
    return subprocess.Popen(
        [*command, PROGRAM, jobs],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_all(folder, name, processes, jobs, *options):
    """Run jobs, each a name, a command and perhaps more, in one torchrun; returns all that was printed."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps([{"name": job, "command": command, **more} for job, command, more in jobs]))
    with torchrun(path, processes, *(options or ["--standalone"])) as started:
        try:
            return started.communicate(timeout=600)[0]
        finally:
            started.terminate()


class Runs:
    """All runs, by name: their folders, the statuses of their processes, and what was printed."""

    def __init__(self, folder):
        self.folder = folder
        self.printed = []

    def statuses(self, name):
        """The status of each process."""
        found = defaultdict(list)
        for path in sorted(self.folder.glob("*.[0-9]")):
            for line in path.read_text().splitlines():
                job, status = json.loads(line)
                found[job].append(status)
        return found[name]

    def rows(self, name):
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def weights(self, name):
        return load_file(self.folder / name / "model.safetensors")


# The run of one process that each is compared with, and its settings.
ONE = {
    "one": (TARFLOW,),
    "one Flow++": (FLOWPP,),
    "one volume-preserving": (VOLUME_PRESERVING,),
    "one Muon": (MUON,),
}
BY_TWO = {
    "two": ("one", TARFLOW),
    "two sharded": ("one", TARFLOW, FULL),
    "two accumulating": ("one", TARFLOW, ACCUMULATE),
    "two Flow++": ("one Flow++", FLOWPP),
    "two Flow++ sharded": ("one Flow++", FLOWPP, FULL),
    "two volume-preserving accumulating": ("one volume-preserving", VOLUME_PRESERVING, ACCUMULATE),
    "two volume-preserving sharded": ("one volume-preserving", VOLUME_PRESERVING, FULL),
    "two Muon": ("one Muon", MUON),
}
BY_FOUR = {
    "four": ("one", TARFLOW),
    "four sharded": ("one", TARFLOW, FULL, {"activation_checkpointing": None}),
}
HYBRID = {"hybrid": ("one", TARFLOW, {"sharding": "hybrid"})}
# Harm, further settings, further ones of the last process alone, and the error.
FAILING = {
    "unreadable": ("unreadable", {}, [], r"data_dir: expected the folder .* \(process 1 of 2\)"),
    "another seed": (None, {}, ["--seed=1"], "settings: expected the same in all processes; process 1 has others"),
    "no equal shares": (None, {"batch_size": 15}, [], "batch_size: expected a multiple of 2, of 2 processes and 1"),
    "one machine": (None, {"sharding": "hybrid"}, [], "sharding: expected full; hybrid shards within machines of"),
    "without space": ("full_disk", FULL, [], r"\[Errno 28\] No space left .* while writing .*step-00000008; what was"),
}


@pytest.fixture(scope="module", autouse=True)
def _small_files():
    """Samples are in files of 50 images, as in the program for torchrun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SIZE", 50)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one process, of two, of four, and of two on each of two machines."""
    folder = tmp_path_factory.mktemp("parallel")
    runs = Runs(folder)
    for name, settings in ONE.items():
        assert main(train(folder / name, *settings)) == 0

    def jobs(table):
        return [(name, train(folder / name, *settings), {}) for name, (_, *settings) in table.items()]

    assert main(sample(folder, "by one")) == 0
    write_few_images(folder / "few")
    shutil.copytree(folder / "one", folder / "not shared")
    for name in "by one", "by two", "by four", "in part":
        shutil.copytree(folder / "one", folder / f"scored {name}")
    assert main(evaluate(folder, "scored by one")) == 0
    by_four = [
        *jobs(BY_FOUR),
        ("resumed", train(folder / "resumed", TARFLOW, FULL, max_steps=8), {}),
        ("sampled by four", sample(folder, "by four"), {}),
        ("pictures", [*sample(folder, "pictures"), "--format=png"], {}),
        ("scored by four", evaluate(folder, "scored by four"), {}),
    ]
    runs.printed.append(run_all(folder, "four", 4, by_four))
    by_two = [
        *jobs(BY_TWO),
        ("two again", train(folder / "two again", TARFLOW), {}),
        ("sampled by two", sample(folder, "by two"), {"harm": "bad_samples"}),
        ("sampled again by two", sample(folder, "by two"), {}),
        ("scored by two", evaluate(folder, "scored by two"), {}),
        ("scored in part", evaluate(folder, "scored in part"), {"harm": "bad_samples"}),
        ("one file", sample(folder, "picture.png"), {}),
        ("resumed by two", ["train", f"--resume={folder / 'resumed'}", "--max-steps=14"], {}),
        ("not shared", ["train", f"--resume={folder / 'not shared'}", "--max-steps=24"], {"harm": "unshared"}),
        ("nan", train(folder / "nan", TARFLOW), {"harm": "nan"}),
        ("nan sharded", train(folder / "nan sharded", TARFLOW, FULL), {"harm": "nan"}),
        ("terminated", train(folder / "terminated", TARFLOW), {"harm": "stop"}),
        ("interrupted", train(folder / "interrupted", TARFLOW, FULL), {"harm": "interrupt"}),
    ]
    for name, (harm, settings, of_the_last, _) in FAILING.items():
        more = {"of_the_last": of_the_last} | ({"harm": harm} if harm else {})
        by_two.append((name, train(folder / name, TARFLOW, settings), more))
    runs.printed.append(run_all(folder, "two", 2, by_two))
    assert main(["train", f"--resume={folder / 'resumed'}", "--max-steps=20", "--sharding=none"]) == 0
    return runs


def assert_same(runs, name, as_name):
    """Rows are equal to rounding, and so are all weights that the loss depends on; Muon rounds to bfloat16."""
    tolerance = 1e-3 if "Muon" in name else 1e-5
    rows, expected = runs.rows(name), runs.rows(as_name)
    assert len(rows) == len(expected) == 21
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() - {COMMUNICATION} == other.keys()
        for measure in row.keys() & {"loss", "bits_per_dim", "grad_norm", "bad_steps", "eval_bits_per_dim"}:
            assert row[measure] == pytest.approx(other[measure], abs=tolerance, rel=tolerance), (measure, row)
    weights = runs.weights(as_name)
    for key, value in runs.weights(name).items():
        assert_close(felt(key, value), felt(key, weights[key]), atol=tolerance, rtol=tolerance, msg=key)


@pytest.mark.parametrize("name", ["two", "two sharded"])
def test_the_share_of_time_in_communication_is_logged_once(runs, name):
    (share,) = [row[COMMUNICATION] for row in runs.rows(name) if COMMUNICATION in row]
    assert 0 < share < 1


def felt(key, value):
    """The weights without biases of keys: attention does not depend on them, and Adam makes steps of their rounding."""
    return torch.cat(value.chunk(3)[::2]) if key.endswith("qkv.bias") else value


@pytest.mark.parametrize(("name", "as_name"), [(name, settings[0]) for name, settings in (BY_TWO | BY_FOUR).items()])
def test_a_run_on_several_devices_is_that_on_one(runs, name, as_name):
    assert runs.statuses(name) == [0] * (4 if name in BY_FOUR else 2), runs.printed
    assert_same(runs, name, as_name)


def test_a_run_on_as_many_devices_again_is_the_same_to_the_bit(runs):
    files = [(runs.folder / name / "model.safetensors").read_bytes() for name in ("two", "two again")]
    assert files[0] == files[1]
    losses = [[row.get("loss") for row in runs.rows(name)] for name in ("two", "two again")]
    assert losses[0] == losses[1]


def test_a_run_goes_on_with_other_numbers_of_devices_and_another_sharding(runs):
    assert_same(runs, "resumed", "one")
    names = [path.name for path in checkpoints.checkpoints(runs.folder / "resumed" / "checkpoints")]
    assert names == ["step-00000014", "step-00000016.pt", "step-00000020.pt"]


def test_processes_that_find_different_checkpoints_do_not_go_on(runs):
    assert runs.statuses("not shared") == [1, 1]
    message = "last checkpoint: expected the same in all processes; process 1 has others"
    assert "\n".join(runs.printed).count(f"tarflow train: error: {message}") == 1
    assert runs.rows("not shared") == runs.rows("one")


@pytest.mark.parametrize("name", ["nan", "nan sharded"])
def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(runs, name):
    assert runs.statuses(name) == [0, 0]
    rows = [row for row in runs.rows(name) if "loss" in row]
    assert [row["step"] for row in rows if row["loss"] != row["loss"]] == [7]
    assert [row["bad_steps"] for row in rows] == [0] * 6 + [1] * 14
    assert all(weight.isfinite().all() for weight in runs.weights(name).values())


@pytest.mark.parametrize("name", ["terminated", "interrupted"])
def test_a_signal_to_one_process_stops_all_after_the_step_with_a_checkpoint(runs, name):
    assert runs.statuses(name) == [0, 0]
    (path,) = checkpoints.checkpoints(runs.folder / name / "checkpoints")
    assert checkpoints.step_of(path) == 7
    line = f"tarflow train: stopped at step 7; go on with --resume {runs.folder / name}"
    assert "\n".join(runs.printed).count(line) == 1


@pytest.mark.parametrize(("name", "message"), [(name, case[-1]) for name, case in FAILING.items()])
def test_a_failure_of_one_process_is_one_line_and_the_end_of_all(runs, name, message):
    assert runs.statuses(name) == [1, 1]
    assert len(re.findall(f"tarflow train: error: {message}", "\n".join(runs.printed))) == 1
    assert not [*(runs.folder / name).glob("checkpoints/*")]


def test_samples_are_the_same_for_any_number_of_processes_and_interruptions(runs):
    assert runs.statuses("sampled by two") == [1, 1]  # once one file was drawn that was not finite
    assert runs.statuses("sampled again by two") == [0, 0]
    assert runs.statuses("sampled by four") == [0] * 4
    files = {out: read_files(runs.folder / out) for out in ("by one", "by two", "by four")}
    assert sorted(files["by one"]) == ["00000.npz", "00001.npz", "00002.npz", "samples.json"]
    assert files["by one"] == files["by two"] == files["by four"]
    images, labels = (
        np.concatenate([np.load(path)[key] for path in sorted((runs.folder / "by two").glob("*.npz"))])
        for key in ("images", "labels")
    )
    assert images.shape == (120, 28, 28, 1)
    assert len(np.unique(images, axis=0)) == 120
    assert (labels == np.arange(120) % 10).all()
    assert "1 of 50 samples are not finite; --on-nan redraw draws others" in "\n".join(runs.printed)


def test_pictures_are_those_samples_and_what_is_lost_of_them_is_drawn_again(runs):
    assert runs.statuses("pictures") == [0] * 4
    folder = runs.folder / "pictures"
    written = sorted(folder.glob("*.png"))
    assert [path.name for path in written] == [f"{number:06d}.png" for number in range(120)]
    contents, lost = [path.read_bytes() for path in written], written[110]
    lost.unlink()
    assert main([*sample(runs.folder, "pictures"), "--format=png"]) == 0
    assert [path.read_bytes() for path in written] == contents
    arrays = np.concatenate([np.load(path)["images"] for path in sorted((runs.folder / "by one").glob("*.npz"))])
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in written]), arrays[..., 0])


def read_files(folder):
    """The files of a folder, by name; archives are compared by what is in them, without their dates."""
    return {
        path.name: path.read_text() if path.suffix == ".json" else {k: v.tobytes() for k, v in np.load(path).items()}
        for path in folder.iterdir()
    }


def test_samples_of_other_settings_are_not_added_to_a_folder(runs, capsys):
    for flags, got in (["--seed=1"], "seed 1"), (["--num=130"], "num 130"):
        assert main([*sample(runs.folder, "by one"), *flags]) == 1
        assert (
            f"out: expected a new folder, or one with samples of these settings; got {got}" in capsys.readouterr().err
        )
    model = runs.folder / "terminated"  # the same settings, some steps before
    assert main(["sample", str(model), *sample(runs.folder, "by one")[2:]]) == 1
    assert "samples of these settings; got another model" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "processes"), [("scored by two", 2), ("scored by four", 4)])
def test_scores_are_the_same_for_any_number_of_processes_and_told_by_one(runs, name, processes):
    assert runs.statuses(name) == [0] * processes, runs.printed
    one, several = (json.loads((runs.folder / run / "evaluation.json").read_text()) for run in ("scored by one", name))
    assert several["samples"]["scores"] == pytest.approx(one["samples"]["scores"], rel=1e-9)
    assert several["scores"].keys() == one["scores"].keys()
    for score, estimate in one["scores"].items():
        assert several["scores"][score] == pytest.approx(estimate, rel=1e-9)
    assert one["samples"]["protocol"]["reference"] == several["samples"]["protocol"]["reference"]
    assert several["samples"]["protocol"]["device"] == f"{processes} x cpu"
    printed = runs.printed[0 if processes == 4 else 1]
    assert all(printed.count(f"  {score}\n") == 1 for score in (*one["scores"], *one["samples"]["scores"]))


def test_samples_of_one_process_that_are_never_finite_end_the_scores_of_all(runs):
    assert runs.statuses("scored in part") == [1, 1]
    error = "tarflow evaluate: error: 1 of 16 samples are not finite after being drawn anew 10 times (process 1 of 2)"
    assert "\n".join(runs.printed).count(error) == 1
    assert not (runs.folder / "scored in part" / "evaluation.json").exists()


def test_several_processes_do_not_write_one_file(runs):
    assert runs.statuses("one file") == [1, 1]
    assert "out: expected a folder, to which several processes write" in "\n".join(runs.printed)


def test_weights_are_sharded_within_machines_and_copied_between_them(runs):
    name, (as_name, *settings) = next(iter(HYBRID.items()))
    path = runs.folder / "hybrid.json"
    path.write_text(json.dumps([{"name": name, "command": train(runs.folder / name, *settings)}]))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    machines = [torchrun(path, 2, *where, f"--node-rank={node}") for node in range(2)]
    printed = [machine.communicate(timeout=200)[0] for machine in machines]
    assert runs.statuses(name) == [0] * 4, printed
    assert_same(runs, name, as_name)


def test_a_run_of_which_a_process_is_killed_while_it_saves_is_restarted_and_loses_nothing(runs):
    job = ("killed", train(runs.folder / "killed", TARFLOW, FULL), {"harm": "die_in_a_save"})
    printed = run_all(runs.folder, "killed", 2, [job], "--standalone", "--max-restarts=1")
    assert runs.statuses("killed") == [0, 0], printed
    assert "steps 8 to 20" in printed
    assert_same(runs, "killed", "one")
    left = [path.name for path in (runs.folder / "killed" / "checkpoints").iterdir()]
    assert sorted(left) == ["step-00000008", "step-00000016", "step-00000020"]


DOCUMENTED = [
    line
    for page in ("README.md", "docs/distributed.md")
    for line in re.findall(r"^torchrun .*|(?<=`)torchrun [^`]*-m [^`]*", (ROOT / page).read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_torchrun_takes_the_commands_that_are_documented(command):
    taken = get_args_parser().parse_args(command.split()[1:])
    assert taken.module
    assert taken.training_script == "tarflow"
    assert taken.training_script_args[0] in ("train", "sample", "evaluate", "statistics")


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    model, device = TarFlow(TarFlowConfig(channels=64)), torch.device("cpu")
    with pytest.raises(ValueError, match="sharding: expected none for a single process; got full; start several by"):
        parallel.make_mesh("full", device, model)
    monkeypatch.setattr(parallel, "num_ranks", lambda: 512)
    with pytest.raises(
        ValueError, match="sharding: expected layers of at least 512 rows, a row for each device; got 256"
    ):
        parallel.make_mesh("full", device, model)
    with pytest.raises(ValueError, match="sharding: expected none with muon, which needs whole matrices; got hybrid"):
        TrainingConfig(optimizer="muon", sharding="hybrid")


def run_alone(runs, harm):
    """Run a training of two processes, of which one does harm while they connect; returns all that was printed."""
    return run_all(runs.folder, f"alone {harm}", 2, [(harm, train(runs.folder / harm, TARFLOW), {"harm": harm})])


def test_processes_of_other_code_are_refused(runs):
    printed = run_alone(runs, "other_code")
    message = "tarflow train: error: code: expected the same in all processes; process 1 has others than process 0"
    assert printed.count(message) == 1
    assert runs.statuses("other_code") == [1, 1]
    assert not (runs.folder / "other_code").exists()


def test_a_port_that_is_taken_is_named_and_nothing_begins(runs):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        jobs = [("taken", train(runs.folder / "taken", TARFLOW), {})]
        printed = run_all(runs.folder, "taken", 2, jobs, "--master-addr=localhost", f"--master-port={port}")
    assert f"port: {port}" in printed
    assert "EADDRINUSE" in printed
    assert not (runs.folder / "taken").exists()


def test_a_process_that_does_not_begin_is_named(runs):
    printed = run_alone(runs, "late")
    assert (
        "tarflow train: error: torchrun: expected all 2 processes to begin within 0:00:08; got none of number 1"
        in printed
    )
