"""Commands say what they take, load no more than they use, calibrate decoders and convert published checkpoints."""

import importlib
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from commands import arrays, main
from published_state import published_state
from tarflow import TarFlow, cli
from tarflow.cli.evaluate import Evaluate
from tarflow.cli.parsing import flags_of, parse
from tarflow.cli.train import read_flags
from tarflow.decoding import calibration


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_the_usage_names_the_commands(capsys, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["tarflow", *arguments])
    assert [cli.main(), cli.main(arguments)] == [0, 0]
    usage = capsys.readouterr().out
    assert all(f"\n  {command} " in usage for command in cli.COMMANDS)


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(*arguments, "--help")
    assert exit.value.code == 0
    return capsys.readouterr().out


def flags_in(text):
    return set(re.findall(r"(?<![\w`])--[a-z][a-z0-9.-]*[a-z0-9]", text)) - {"--help"}


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "train"])
def test_help_lists_every_flag(capsys, command):
    settings = getattr(importlib.import_module(f"tarflow.cli.{command}"), command.capitalize())
    assert {*flags_of(settings)} <= flags_in(help_of(capsys, command))


OF_ONE_MODEL = {
    "tarflow": "--patch-size --channels --num-blocks --layers-per-block --head-dim --expansion --volume-preserving "
    "--sigma --label-drop --conditional --guidance.weight --guidance.temperature",
    "flowpp": "--stack --filters --blocks-per-coupling --attention --pointwise --elu-output --weight-norm --dropout",
}

OF_EVERY_MODEL = (
    "--model --preset --out --resume --dataset --image-size --coupling --num-mixtures --noise --batch-size "
    "--dequantizer.filters --importance-samples --learning-rate --device"
)


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        ([], "tarflow"),
        (["--model=flowpp"], "flowpp"),
        (["--preset=cifar10-flowpp"], "flowpp"),
        (["--preset=afhq256-cond"], "tarflow"),
    ],
    ids=str,
)
def test_help_for_training_lists_the_flags_of_the_chosen_model_alone(capsys, flags, model):
    listed = flags_in(help_of(capsys, "train", *flags))
    others = {flag for name, flags in OF_ONE_MODEL.items() if name != model for flag in flags.split()}
    assert {*OF_EVERY_MODEL.split(), *OF_ONE_MODEL[model].split()} <= listed
    assert not listed & {*others, "--in-channels", "--num-classes"}


def test_sizes_are_flags_of_one_number_or_one_for_each_block():
    command, _ = read_flags(["--channels=64", "--layers-per-block", "2", "2", "2", "8"])
    assert (command.architecture.channels, command.architecture.layers_per_block) == (64, (2, 2, 2, 8))
    with pytest.raises(ValueError, match=r"^layers_per_block: expected .*, or 3 of them, .*; got \(2, 8\)"):
        read_flags(["--num-blocks=3", "--layers-per-block", "2", "8"])


@pytest.mark.parametrize(
    ("read", "old", "new"),
    [
        (read_flags, ["--score-draws=0"], ["--importance-samples=0"]),
        (read_flags, ["--guidance", "1.5"], ["--guidance.weight", "1.5"]),
        (read_flags, ["--model=flowpp", "--no-conditional"], ["--model=flowpp"]),
        (partial(parse, Evaluate), ["run", "--draws=1"], ["run", "--importance-samples=1"]),
    ],
    ids=["score-draws", "guidance", "no-conditional", "draws"],
)
def test_flags_of_the_last_release_mean_what_they_meant(read, old, new):
    assert read(old)[0] == read(new)[0]


SAMPLING = """
import sys
from tarflow.cli import main
assert main(sys.argv[1:]) == 0
print(*(name for name in ("tensorboard", "torch.utils.tensorboard", "tarflow.training.trainer") if name in sys.modules))
"""


def test_sampling_imports_neither_tensorboard_nor_the_trainer(run, tmp_path):
    arguments = ["sample", run, "--num=2", f"--out={tmp_path / 's.png'}", "--device=cpu"]
    sampled = subprocess.run([sys.executable, "-c", SAMPLING, *arguments], capture_output=True, text=True)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.splitlines()[-1] == ""


def test_the_trainer_imports_no_matplotlib():
    command = "import sys, tarflow.training.trainer; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


def test_calibrate_stores_what_auto_then_goes_by(run, tmp_path, capsys):
    folder = tmp_path / "run"
    model = TarFlow.from_pretrained(run)
    model.save_pretrained(folder)
    assert main("calibrate", folder, "--batches", "1", "2", "--device=cpu") == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {folder / 'calibration.json'}"
    stored = calibration.load(folder)
    assert {timing.rows for timing in stored} == {2, 4}
    assert {(timing.block, timing.decoder) for timing in stored if timing.rows == 2} == {
        (t, name) for t in (0, 1) for name in ("sequential", "jacobi")
    }
    assert all(timing.passes == 15 for timing in stored if timing.decoder == "sequential")
    assert TarFlow.from_pretrained(folder).flow.calibration == stored
    assert main("sample", folder, "--num=1", f"--out={tmp_path / 's.npz'}") == 0


def test_a_published_checkpoint_is_converted_and_sampled(tmp_path, capsys):
    state, out = published_state(), tmp_path / "converted"
    torch.save(state, tmp_path / "model.pth")
    assert main("convert", tmp_path / "model.pth", out, "--sigma=0.05") == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: TarFlowConfig(image_size=4, in_channels=3, patch_size=2")
    transformer = TarFlow.from_pretrained(out).flow.blocks[1].transformer
    assert torch.equal(transformer.layers[0].mlp[2].weight, state["blocks.1.attn_blocks.0.mlp.main.2.weight"])
    drawn = arrays(out, tmp_path / "s.npz", "--guidance=1")
    assert (drawn["images"].shape, drawn["labels"].max()) == ((12, 4, 4, 3), 2)
    assert not np.array_equal(arrays(out, tmp_path / "s.npz", "--guidance=1", "--sigma=0")["images"], drawn["images"])
    assert main("convert", tmp_path / "model.pth", out) == 1
    assert f"out: {out} already holds a model" in capsys.readouterr().err
