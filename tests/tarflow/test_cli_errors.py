"""What a user gets wrong ends in one line that says what was expected; a mistake of ours is not taken for one."""

import re

import pytest
import torch

from commands import DATASET_NAMES, TINY, main
from tarflow import TarFlow


@pytest.fixture
def broken(run, tmp_path):
    """Files that are not what they should be."""
    for name in DATASET_NAMES:
        (tmp_path / name).write_bytes(b"not a dataset")
    model = TarFlow.from_pretrained(run)
    model.metadata = {}
    for name in ("model", "cut", "cut-config", "old-config", "bad-config"):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "cut" / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1000])
    (tmp_path / "cut-config" / "config.json").write_text('{"train": {')
    (tmp_path / "old-config" / "config.json").write_text('{"train": {"data_dir": null, "width": 3}}')
    for name, text in (("deep", "[" * 100_000), ("null", '{"train": null}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (tmp_path / "bad-config" / "config.json").write_text('{"train": {"data_dir": null, "noise": 5}}')
    (tmp_path / "folder.png").mkdir()
    return tmp_path


# Commands and the start of the line that each ends in, {value} being each of the values with | between them.
LINES = r"""
sample {broken}/none                  source: expected a folder with config\.json .* no .*/none/config\.json
train --resume={broken}/none          resume: .*/none/config\.json does not exist
convert {broken}/none.pth {broken}/new  .*/none\.pth
convert {run}/config.json {broken}/new  source: .*/config\.json is .* not a state dict
convert {run}/checkpoints/step-00000008.pt {broken}/new  source: expected the state
sample {broken}/cut                   .*/cut/model\.safetensors: truncated or corrupt
sample {broken}/deep                  .*/deep/config\.json: truncated or corrupt: maximum recursion depth
evaluate {broken}/null                .*/null/config\.json: train: expected an object; got None
train --resume={broken}/null          .*/null/config\.json: train: expected an object; got
train --batch-size=1000000000 --out={broken}/new  memory: expected training at batch size
train --dataset=mnist --data-dir={broken}  .*/train-images-idx3-ubyte: expected an IDX header
train --dataset=mnist --data-dir={run}  data_dir: expected .* in .*/run, missing train-images
train --dataset=minst                 name: expected one of fashion-mnist, .* got 'minst'
train --max-steps=1 --out={run}       out: .*/run already holds a run; choose another folder, or
train --channels=100 --out={broken}/new  head_dim: expected a divisor of channels 100; got 64
train --dataset=imagenet32-2016 --data-dir={photos} --out={broken}/new  conditional: expected False
evaluate {run} --dataset=imagenet32-2016 --data-dir={photos}  dataset: expected labels for a model that is
sample {run} --tolerance=-1           tolerance: expected a finite number >= 0; got -1
calibrate {run} --batches 0           batches: expected positive numbers; got \(0,\)
calibrate someone/model               run: expected a folder to write to; got someone/model
train --resume={broken}/model         resume: .*/model holds a model without a training run
train --resume={broken}/cut-config    .*/cut-config/config\.json
calibrate {flowpp}                    run: expected a TarFlow, whose decoders .* holds a Flow
train --resume={broken}/old-config    .*/old-config/config\.json
train --resume={broken}/bad-config    .*/bad-config/config\.json: noise: .* got 5
train --learning-rate=inf|nan|1e+300|-1.0  learning_rate: expected a number > 0, at most 3\.4e\+38; got {value}
train --min-learning-rate=nan|inf|1.0|-1.0  min_learning_rate: .* from 0 to the learning rate, 0\.006; got {value}
train --gradient-clip=inf|nan         gradient_clip: expected a number > 0, at most 3\.4e\+38; got {value}
train --sigma=0                     sigma: expected more than 0 with Gaussian noise
train --resize=box                  resize: expected with --dataset folder alone, .*; got --resize=box
train --weight-decay=inf|nan          weight_decay: expected a number >= 0, at most 3\.4e\+38; got {value}
train --sigma=inf|nan|1e+300          sigma: expected a number from 0 to 10, .* got {value}
train --model=flowpp --dropout=-1.0|1.5|nan|inf  dropout: expected a number in \[0, 1\); got {value}
train --label-drop=nan                label_drop: expected a number >= 0 and below 1; got nan
train --beta2=1                       beta2: expected .* got 1\.0
train --ema-decay=1.5                 ema_decay: expected .* got 1\.5
train --seed=-1|9223372036854775808   seed: expected an integer from 0 to 2\^63 - 1; got {value}
train --max-steps=0|1{thirty}         max_steps: expected an integer from 1 to 2\^63 - 1; got {value}
train --channels=1{eighteen}          channels: expected .* got 1{eighteen}
train --num-blocks=1{thirty}          num_blocks: expected .* got 1{thirty}
train --batch-size=1{eighteen}        memory: expected training at batch size 1{eighteen} to take at most
train --batch-size=1{thirty}          batch_size: expected .* got 1{thirty}
train --importance-samples=1{eighteen}  importance_samples: expected an integer from 0 to 100000; got 1{eighteen}
train --score-draws=-1                importance_samples: expected an integer from 0 to 2\^63 - 1; got -1
train --image-size=0                  image_size: expected 1 to 7071, got 0
train --device=meta|hpu|cpu:7         device: expected auto or a device that PyTorch has here, cpu.*; got '{value}'
train --num-mixtures=65               num_mixtures: expected an integer in \[1, 64\]; got 65
train --num-mixtures=5                num_mixtures: expected with --coupling mixture alone
train --noise=uniform --sigma=0.1     sigma: expected with --noise gaussian alone
train --sigma=0.1 --noise-levels 0.1 0.2  sigma: expected with --noise-levels None alone
train --noise=uniform --noise-levels 0.1 0.2  noise: expected gaussian for a model with noise levels; got uniform
train --noise-levels 0.2 0.1          noise_levels: expected two rising numbers > 0, .*; got \(0\.2, 0\.1\)
train --dequantizer.filters=16        dequantizer: expected with --noise variational alone
train --no-conditional --label-drop=0.2  label_drop: expected with --conditional alone
train --model=flowpp --noise=gaussian  noise: expected uniform or variational for flowpp
train --model=tarflow --preset=cifar10-flowpp  model: expected flowpp, the model of --preset cifar10-flowpp; got tarflow
train --resume={run} --model=flowpp   model: expected tarflow, the model of --resume .*/run; got flowpp
train --resume={run} --preset=imagenet64  preset: expected none besides --resume, .* got imagenet64
train --resume={run} --max-steps=7    max_steps: expected at least 8, which .*/run is at; got 7
train --out={run}/config.json         out: expected a folder; got .*/run/config\.json
train --out={run}/config.json/x       out: expected a folder; got .*/config\.json/x, and .*/config\.json is a file
sample {run} --device=quantum|cpu:7|meta|cuda:99  device: expected auto or a device that PyTorch has .*; got '{value}'
sample {run} --seed=-1|9223372036854775808  seed: expected an integer from 0 to 2\^63 - 1; got {value}
sample {run} --guidance=1e+300|-1|nan  guidance: expected a number from 0 to 100; got {value}
sample {run} --guidance=1 --temperature=1e-300  temperature: expected a number from 0\.001 to 1000; got 1e-300
sample {run} --temperature=0.5        temperature: expected none without --guidance, .* got 0\.5
sample {run} --schedule=constant      schedule: expected none without --guidance, .* got constant
sample {run} --no-drop-label          drop_label: expected none without --guidance, .* got False
sample {unconditional} --guidance=2   guidance: .* or a temperature other than 1; got
sample {run} --sigma=nan|inf|-1|1e+300  sigma: expected a number from 0 to 10, .* got {value}
sample {run} --guidance=1 --guided-blocks=0  guided_blocks: expected at least 1; got 0
sample {run} --guided-blocks=1        guided_blocks: expected none without --guidance, .* got 1
sample {run} --guidance=1 --rule=gaussian --guide=mu  parameters: expected both with the rule gaussian; got 'mu'
sample {run} --denoising-steps=0      denoising_steps: expected at least 1; got 0
sample {run} --sigma=0 --clip         clip: expected none with --sigma 0, .*; got True
sample {run} --stochastic             stochastic: expected none for a TarFlow, .*; got True
sample {run} --num=0                  num: expected at least 1; got 0
sample {run} --num=10000              num: expected at most 333 rows and columns of a picture; got 10 x 1000
sample {unconditional} --num=10000    num: expected at most 333 rows and columns of a picture; got 1250 x 8
sample {run} --num=1{eighteen}        memory: expected num = 1{eighteen} samples to take at most
sample {run} --num=1{thirty} --out=s.npz  memory: expected num = 1{thirty} samples to take at most
sample {flowpp} --num=1{eighteen} --out=s.npz  memory: expected num = 1{eighteen} samples to take at most
sample {run} --labels                 labels: expected 1 to 80 classes, as --num says; got 0
sample {run} --labels 1 2 3 --num=2   labels: expected 1 to 2 classes, as --num says; got 3
sample {run} --labels 10|-2|1{thirty}  labels: expected classes from 0 to 9, or -1 for no label; got {value}
sample {unconditional} --labels 1     labels: expected none for an unconditional model; got 1
sample {run} --out=s.jpg|.png         out: expected a file of \.png, .*, or a folder; got {value}
sample {run} --out=folder.png         out: expected a file; got the folder folder\.png
sample {run} --out=nowhere/s.png      out: expected a file in a folder that exists; got nowhere/s\.png
sample {run} --trajectory=t.txt       trajectory: expected a picture \(.*png.*\); got t\.txt
sample {run} --trajectory=t           trajectory: expected a picture .*; got t
sample {run} --trajectory=nowhere/t.png  trajectory: expected a file in a folder that exists; got nowhere/t\.png
sample {run} --out=s.png --trajectory=./s.png  trajectory: expected another file than --out; got s\.png for both
sample {run} --decoder=jacobi --window=0  window: expected at least 1; got 0
sample {run} --window=4               window: expected none with the auto decoder, only with jacobi
sample {run} --decoder=sequential --tolerance=0.1  tolerance: expected none for the sequential decoder; got 0\.1
sample {flowpp} --guidance=2          guidance: expected none for a FlowPP, which has no use for it; got 2\.0
sample {flowpp} --labels 1            labels: expected none for an unconditional model; got 1
sample {flowpp} --sigma=0             sigma: expected none for a FlowPP
sample {flowpp} --tolerance=0.1       tolerance: expected none for a FlowPP
sample {flowpp} --decoder=jacobi      decoder: expected none for a FlowPP
calibrate {run} --batches             batches: expected positive numbers; got \(\)
calibrate {run} --batches 1{eighteen}  memory: expected batches of 1{eighteen} to take at most
calibrate {run} --guidance=nan        guidance: expected a number from 0 to 100; got nan
calibrate {run} --tolerance=nan       tolerance: expected a finite number >= 0; got nan
sample {run} --tolerance=1e300        tolerance: expected at most 1, .*; got 1e\+300
calibrate {run} --tolerance=3         tolerance: expected at most 1, .*; got 3
convert /dev/zero new                 source: /dev/zero is .* not a state dict: it is no file
convert {run} new                     source: .*/run is .* not a state dict: it is no file
evaluate {run} --resize=box           resize: expected with a folder or a hub alone, .*; got box
evaluate {run} --dataset=folder --data-dir={photos}/good --image-size=28  dataset: expected images of shape \(1
evaluate {run} --num-images=0         num_images: expected at least 1; got 0
evaluate {run} --draws=0              importance_samples: expected at least 1; got 0
evaluate {run} --importance-samples=1{eighteen}  importance_samples: expected at most 100000; got 1{eighteen}
evaluate {run} --batch-size=-1        batch_size: expected at least 1; got -1
evaluate {run} --seed=-1              seed: expected an integer from 0 to 2\^63 - 1; got -1
evaluate {run} --image-size=0         image_size: expected 1 to 7071, got 0
evaluate {run} --dataset=minst        name: expected one of fashion-mnist, .* got 'minst'
evaluate someone/model                run: expected a folder to write to; got someone/model
evaluate {run} --samples=1|3|-1       samples: expected at least 4, or 0 for none; got {value}
evaluate {run} --samples=1{eighteen}  memory: expected samples = 1{eighteen} to take at most
evaluate {run} --samples=1{thirty}    memory: expected samples = 1{thirty} to take at most
evaluate {run} --guidance=2           guidance: expected with --samples alone, .*; got --guidance=2
evaluate {run} --protocol=tarflow     protocol: expected with --samples alone, .*; got --protocol=tarflow
evaluate {run} --no-drop-label        drop_label: expected with --samples alone, .*; got --no-drop-label
evaluate {run} --weights=none.pth     weights: expected with --samples alone, .*; got --weights=none\.pth
evaluate {run} --samples=8 --sigma=nan  sigma: expected a number from 0 to 10, .* got nan
evaluate {run} --samples=8 --schedule=constant  schedule: expected none without --guidance, .* got constant
evaluate {run} --samples=8 --tolerance=3  tolerance: expected at most 1, .*; got 3
evaluate {run} --samples=8 --window=4  window: expected none with the auto decoder, only with jacobi
evaluate {run} --samples=8 --weights=none.pth  weights: expected the Inception .* https://.*; there is no file none\.pth
evaluate {run} --samples=8 --weights={run}/config.json  weights: expected the Inception .* of SHA-256 6726825d.*; got
evaluate {run} --samples=8 --statistics=none  statistics: expected a file that .* wrote; there is no none
evaluate {run} --samples=8 --statistics={run}/model.safetensors  statistics: expected a file .* wrote; got .*/model\.saf
evaluate {flowpp} --samples=8 --guidance=2  guidance: expected none for a FlowPP, which has no use for it; got 2\.0
statistics fashion-mnist --out=nowhere/s  out: expected a file in a folder that exists; got nowhere/s
statistics fashion-mnist --out=new --resize=box  resize: expected with a folder or a hub alone, .*; got box
statistics fashion-mnist --out=new --batch-size=0  batch_size: expected at least 1; got 0
statistics fashion-mnist --out=new --seed=-1  seed: expected an integer from 0 to 2\^63 - 1; got -1
statistics minst --out=new            name: expected one of fashion-mnist, .* got 'minst'
statistics imagenet32-2016 --data-dir={photos} --out=new  weights: expected a file for images other than Fashion-MNIST
convert {run}/none.pth new --sigma=nan|inf  sigma: expected a number from 0 to 10, .* got {value}
convert {run}/none.pth {run}/config.json  out: expected a folder; got .*/run/config\.json
"""

# Arguments that are none of the command, which have an exit status of their own.
USAGE_LINES = r"""
train --filters=-1                    --filters: expected with --model flowpp alone, .*; got --filters=-1
train --filters 32                    --filters: expected with --model flowpp alone, .*; got --filters
train --stack=squeeze                 --stack: expected with --model flowpp alone
train --no-pointwise                  --no-pointwise: expected with --model flowpp alone, .*; got --no-pointwise
train --dropout=0.5                   --dropout: expected with --model flowpp alone
train --model=flowpp --channels=64    --channels: expected with --model tarflow alone
train --model=flowpp --sigma=0.1      --sigma: expected with --model tarflow alone
train --model=flowpp --guidance=2     --guidance\.weight: expected with --model tarflow alone
train --resume={run} --filters=8      --filters: expected with --model flowpp alone
train --model=flowpp --conditional    --conditional: expected with --model tarflow alone
train --channels=abc|1e3              --channels: expected INT \[INT \.\.\.\]; got '{value}'
train --layers-per-block 2 2 x 8      --layers-per-block: expected INT \[INT \.\.\.\]; got '2', '2', 'x', '8'
train --learning-rate=fast            --learning-rate: expected FLOAT; got 'fast'
train --image-size=big                --image-size: expected \{None\}\|INT; got 'big'
train --num-blocks=1 --num-blocks=x   --num-blocks: expected INT; got 'x'
train --dequantizer.filters=x         --dequantizer\.filters: expected INT; got 'x'
train --dequantizer.filters=3         --dequantizer\.filters: expected a multiple of the 4 heads of attention; got 3
train --dequantizer.dropout=nan|-1    --dequantizer\.dropout: expected a number in \[0, 1\); got {value}
train --guidance=1e+300|nan           --guidance\.weight: expected a number from 0 to 100; got {value}
train --guidance.temperature=0        --guidance\.temperature: expected a number from 0\.001 to 1000; got 0
train --batch-size                    --batch-size: expected a value; got none
train --max-steps --out=new           --max-steps: expected a value; got none
train --nonsense 3                    --nonsense: expected a flag of tarflow train.*; got '--nonsense'
train --chanels=3                     --chanels: expected a flag of tarflow train, perhaps --channels; got '--chanels=3'
train --in_chanels=3                  --in_chanels: expected a flag of tarflow train.*; got '--in_chanels=3'
train --preset=foo                    --preset: expected one of 'fashion-mnist', .*; got 'foo'
train --preset                        --preset: expected a value; got none
train --model=foo                     --model: expected one of 'tarflow', 'flowpp'; got 'foo'
train --noise=laplace                 --noise: expected one of 'gaussian', 'uniform', 'variational'; got 'laplace'
train --conditional=yes               arguments: expected flags, each with its value; got yes besides
train 3|-x                            arguments: expected flags, each with its value; got {value} besides
train -- new                          arguments: expected flags, each with its value; got new besides
train --help --nonsense               --nonsense: expected a flag of tarflow train.*; got '--nonsense'
train --nonsense -h                   --nonsense: expected a flag of tarflow train.*; got '--nonsense'
train --dataset=                      --dataset: expected a value; got ''
train --dataset ''                    --dataset: expected a value; got ''
train --out=                          --out: expected a value; got ''
train --resume ''                     --resume: expected a value; got ''
sample                                arguments: expected run; got fewer
sample ''                             arguments: expected a value; got ''
sample {run} {run}                    arguments: expected flags, each with its value; got .*/run besides
sample {run} --num 3 4                arguments: expected flags, each with its value; got 4 besides
sample {run} --num=3.5                --num: expected INT; got '3\.5'
sample {run} --labels a b             --labels: expected \[INT \[INT \.\.\.\]\]; got 'a', 'b'
sample {run} --labels 1.5             --labels: expected .*; got '1\.5'
sample {run} --decoder=fast           --decoder: expected one of 'auto', 'sequential', 'jacobi'; got 'fast'
sample {run} --out ''                 --out: expected a value; got ''
sample {run} --trajectory=            --trajectory: expected a value; got ''
sample {run} --help --nonsense        --nonsense: expected a flag of tarflow sample.*; got '--nonsense'
sample {run} --filters=3              --filters: expected a flag of tarflow sample.*; got '--filters=3'
calibrate                             arguments: expected run; got fewer
evaluate {run} --dataset ''           --dataset: expected a value; got ''
evaluate {run} --draws=many           --importance-samples: expected INT; got 'many'
evaluate {run} --protocol=best        --protocol: expected one of 'tarflow', 'balanced'; got 'best'
statistics fashion-mnist              arguments: expected dataset and out; got fewer
convert {run}/none.pth                arguments: expected checkpoint and out; got fewer
convert {run}/none.pth ''             arguments: expected a value; got ''
convert {run}/none.pth new --sigma=a  --sigma: expected FLOAT; got 'a'
"""


def cases():
    for status, lines in ((1, LINES), (2, USAGE_LINES)):
        for line in lines.strip().splitlines():
            command, message = re.split(r"  +", line, maxsplit=1)
            start, values = re.fullmatch(r"(.*[= ])(\S+\|\S+)|.*", command).groups()
            if not values:
                yield pytest.param(command, message, status)
                continue
            for value in values.split("|"):
                pattern = re.sub(r"([.+])", r"\\\1", value)
                yield pytest.param(f"{start}{value}", message.replace("{value}", pattern), status)


@pytest.mark.parametrize(("command", "message", "status"), [*cases()])
def test_what_a_user_gets_wrong_ends_in_one_line(
    run, unconditional, flowpp, photos, broken, monkeypatch, capsys, command, message, status
):
    monkeypatch.chdir(broken)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    named = {"run": run, "unconditional": unconditional, "flowpp": flowpp, "photos": photos, "broken": broken}
    named |= {"eighteen": 18 * "0", "thirty": 30 * "0"}
    command = re.sub(r"\{(\w+)\}", lambda found: str(named[found[1]]), command)
    message = re.sub(r"\{([a-z]\w+)\}", lambda found: str(named[found[1]]), message)
    if command.startswith("train") and "--out" not in command and "--resume" not in command:
        command += " --out=new" if status == 1 else ""
    assert main(*("" if argument == "''" else argument for argument in command.split())) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]  # but progress bars
    assert len(lines) == 1
    assert re.match(f"tarflow {command.split()[0]}: error: {message}", lines[0])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not (broken / "new").exists()


def test_a_command_that_there_is_not_is_answered_with_those_that_there_are(capsys):
    assert main("trian", "--out=x") == 2
    commands = "train, sample, calibrate, evaluate, statistics, encode, demo, convert, push"
    assert capsys.readouterr().err == f"tarflow: error: command: expected one of {commands}; got 'trian'\n"


def test_a_model_in_double_precision_is_not_drawn_from_in_a_lower_one(run, tmp_path, capsys):
    TarFlow.from_pretrained(run).double().save_pretrained(tmp_path)
    for command in ("sample", "calibrate"):
        assert main(command, tmp_path, "--precision=bfloat16") == 1
        assert "precision: expected float32 for " in capsys.readouterr().err


def test_an_unreadable_image_ends_training_in_one_line(photos, tmp_path, capfd):
    flags = (
        f"train --dataset=folder --data-dir={photos / 'bad'} --image-size=14 --max-steps=20 --out={tmp_path / 'run'}"
    )
    assert main(*flags.split(), *TINY.split()) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1
    assert re.match(rf"tarflow train: error: {photos}/bad/[ab]/\d+\.png: expected an image, but reading it", lines[0])


@pytest.mark.parametrize("command", ["sample {run} --out={new}/s.png", "calibrate {run}", "evaluate {run}",
                                     "train --resume={run}", "train --out={new}/run"])  # fmt: skip
def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(run, tmp_path, monkeypatch, capsys, command):
    # Not by its mode, which the superuser of a container does not mind.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("tarflow.pretrained.load_pretrained", None)
    monkeypatch.setattr("tarflow.cli.train.train", None)
    command = command.format(run=run, new=tmp_path)
    assert main(*command.split()) == 1
    assert re.search(
        r": error: (out|run|resume): expected a folder that can be written to; got /", capsys.readouterr().err
    )


WANTS = {
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes": RuntimeError,
    "CUDA out of memory. Tried to allocate 8 GiB": torch.OutOfMemoryError,
    "Unable to allocate 8 GiB for an array": MemoryError,
}


@pytest.mark.parametrize(("message", "error"), WANTS.items())
def test_want_of_memory_is_one_line_that_says_what_to_reduce(run, tmp_path, monkeypatch, capsys, message, error):
    def sample(*arguments, **options):
        raise error(message + "\nException raised from somewhere")

    monkeypatch.setattr(TarFlow, "sample", sample)
    assert main("sample", run, f"--out={tmp_path / 's.png'}") == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"tarflow sample: error: not enough memory; try a smaller --num ({message}")


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_user(run, tmp_path, monkeypatch):
    monkeypatch.setattr(TarFlow, "sample", lambda *arguments, **options: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main("sample", run, f"--out={tmp_path / 's.png'}")
