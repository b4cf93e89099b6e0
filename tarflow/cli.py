"""The commands: train, sample, calibrate, evaluate, convert."""

import argparse
import contextlib
import difflib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import numpy as np
import torch
import tyro
from matplotlib.backend_bases import FigureCanvasBase
from tqdm import tqdm

from . import datasets, evaluation, hardware
from .decoding import NAMES, TOLERANCE, BlockStatistics, Decoder, ProgressCallback, calibration
from .files import atomic_write
from .flowpp.model import FlowPP
from .gallery import Gallery, spread
from .guidance import MAX_WEIGHT, Guidance
from .hardware import pick_device
from .image_flow import ImageFlow
from .model import TarFlow
from .noise import Quantization, quantization, to_pixels
from .pretrained import load_pretrained, read_config
from .published import load_published
from .training.config import MOST_DRAWS, PRESETS, TrainConfig
from .training.run import Diverged, check_scored, train
from .validation import check_sigma


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Anything a user can set right ends in one line on stderr.

    The status is 0, or 2 for arguments that are no flags or values of the command, 130 after Ctrl-C, and 1 otherwise.
    """
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        print(f"tarflow: error: command: expected one of {', '.join(COMMANDS)}; got {command!r}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](arguments)
    except (ValueError, OSError, ImportError, Diverged) as error:
        _print_error(command, str(error))
        return 2 if isinstance(error, UsageError) else 1
    except (MemoryError, RuntimeError) as error:
        if not _is_want_of_memory(error):
            raise
        _print_error(command, f"not enough memory; try {_SMALLER[command]} ({error})")
        return 1
    except KeyboardInterrupt as stop:
        print(f"tarflow {command}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


class UsageError(ValueError):
    """Arguments that are no flags and values of a command."""


_SMALLER = {
    "train": "a smaller --batch-size or model",
    "sample": "a smaller --num",
    "calibrate": "smaller --batches",
    "evaluate": "a smaller --batch-size",
    "convert": "a machine with more of it",
}


def _is_want_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether memory could not be allocated; PyTorch has an error of its own for that on an accelerator alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _print_error(command: str, message: str) -> None:
    print(f"tarflow {command}: error: {' '.join(message.splitlines()[:1])}", file=sys.stderr)


Settings = TypeVar("Settings")


def _parse(kind: type[Settings], arguments: Sequence[str], **options: Any) -> Settings:
    """The settings that the flags of a command tell; UsageError, in a line, where they tell none."""
    command = f"tarflow {kind.__name__.lower()}"
    flags = _flags(kind)
    for before, argument in itertools.pairwise(["", *itertools.takewhile("--".__ne__, arguments)]):
        flag, equals, value = argument.partition("=")
        if not argument or (flag.startswith("--") and equals and not value):
            named = flag or (before if before in flags else "arguments")
            raise UsageError(f"{named}: expected a value; got ''")
        if flag.startswith("--") and flag.replace("_", "-") not in (*flags, "--help") and not flag.startswith("--tyro"):
            close = difflib.get_close_matches(flag, flags, 1, cutoff=0.7)
            hint = f", perhaps {close[0]}" if close else ""
            raise UsageError(f"{flag}: expected a flag of {command}{hint}; got {argument!r}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=arguments, prog=command, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        needed = [field.name for field in fields(kind) if field.default is MISSING and field.name != "config"]
        raise UsageError(_sentence(printed.getvalue(), " and ".join(needed))) from None


def _flags(kind: type, prefix: str = "--") -> dict[str, str]:
    """The flags of a command and the names of their fields, those of a nested field being that of the outermost."""
    flags = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            flat = name == "config"
            inner = _flags(hint, prefix if flat else f"{prefix}{name.replace('_', '-')}.")
            flags |= inner if flat else dict.fromkeys(inner, name)
        else:
            flag = name.replace("_", "-")
            flags |= {f"{prefix}{flag}": name} | ({f"{prefix}no-{flag}": name} if hint is bool else {})
    return flags


def _given(kind: type, arguments: Sequence[str]) -> dict[str, str]:
    """The names of the fields whose flags are among the arguments, and these."""
    flags = _flags(kind)
    told = {flags.get(argument.partition("=")[0].replace("_", "-")): argument for argument in arguments}
    return {name: argument for name, argument in told.items() if name}


_REPHRASED = (
    (r"Error parsing (\S+): [^'\"\[]*\[?(.+?)\]?", r"\1: expected {expected}; got \2"),
    (r"Error parsing config\.(\S+): (\w+: expected .*)", r"--\1.\2"),
    (r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)\.", r"\2: expected one of \3; got \1"),
    (r"Argument (\S+): invalid choice: (.*) \(choose from (.*)\)", r"\1: expected one of \3; got \2"),
    (r"Missing value for argument '(.*)'\. Expected .*", r"\1: expected a value; got none"),
    (r"Argument (\S+): expected .*", r"\1: expected a value; got none"),
    (r"(?:Missing from|The following arguments are required:) .*", r"arguments: expected {needed}; got fewer"),
    (r"Unrecognized (?:options|arguments): (.*)", r"arguments: expected flags, each with its value; got \1 besides"),
)
"""What tyro says of its arguments, by its versions, and what we say."""


def _sentence(box: str, needed: str) -> str:
    """What the box says that tyro draws around an error, in a line: ``flag: expected ...; got ...``."""
    lines = [line.strip(" │╭╮╰╯─") for line in box.splitlines()]
    title, *lines = ["" if set(line) <= {"-"} else line for line in lines]
    message = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines)))
    _, _, usage = "\n".join(lines).partition("Argument helptext:\n")
    expected = usage.partition("\n")[0].partition(" ")[2]
    for pattern, sentence in _REPHRASED:
        if (found := re.fullmatch(pattern, message)) and (expected or "{expected}" not in sentence):
            return found.expand(sentence.replace("{expected}", expected).replace("{needed}", needed))
    return f"{title}: {message}"


@dataclass(frozen=True)
class Train:
    """Train a TarFlow or, with `--model flowpp`, a Flow++. Without more flags: Fashion-MNIST in minutes on a CPU."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: Literal[tuple(PRESETS)] = "fashion-mnist"
    """the recipe whose settings the other flags change; by default fashion-mnist or fashion-mnist-flowpp"""
    out: Path | None = None
    """folder of the run; by default a new one under runs/"""
    resume: Path | None = None
    """folder of a run to go on with, under its own settings where no flag changes them"""


def run_train(arguments: Sequence[str]) -> None:
    """``train``: the preset, or the run to resume, gives the defaults of all other flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--preset", "--resume"):
        first.add_argument(name, nargs="?")  # what is missing or wrong the parser of all flags says
    known, _ = first.parse_known_args(arguments)
    usual = "fashion-mnist-flowpp" if known.model == "flowpp" else "fashion-mnist"
    preset = known.preset if known.preset in PRESETS else usual
    config = _read_run(Path(known.resume)) if known.resume else PRESETS[preset]
    # Once guidance was its weight alone.
    arguments = [re.sub(r"^--guidance(?==|$)", "--guidance.weight", argument) for argument in arguments]
    command = _parse(Train, arguments, default=Train(config, preset=preset))
    given = _given(Train, arguments)
    if command.resume:
        _check_resumed(command, given)
    unused = command.config.unused()
    for name, argument in given.items():
        if name in unused:
            raise ValueError(f"{name}: expected with {unused[name]} alone, which has a use for it; got {argument}")
    if "guidance" in given:  # the default, too, if it was asked for
        command.config.guidance.check(int(command.config.conditional))
    if command.out:
        _check_new("out", command.out)
    out = command.resume or command.out or _new_folder(Path("runs"), command.preset)
    train(command.config, out, resume=command.resume is not None)
    print(f"done    {out}; look at samples.png, trajectory.png and curves.png in it")
    if command.config.model == "flowpp":
        print(f"next    tarflow sample {out} --out samples.png; tarflow evaluate {out} --draws 16")
        return
    guided = " --guidance 2" if command.config.conditional else ""
    print(f"next    tarflow sample {out}{guided} --out samples.png; tarflow calibrate {out}; tarflow evaluate {out}")


def _check_resumed(command: Train, given: dict[str, str]) -> None:
    """ValueError for flags that a run which goes on has no use for."""
    run = command.resume
    if command.out:
        raise ValueError(f"out: expected no folder besides that of --resume, {run}; got {command.out}")
    if "preset" in given:
        raise ValueError(f"preset: expected none besides --resume, since {run} has its settings; got {command.preset}")
    _check_writable("resume", run)
    names = (re.fullmatch(r"step-(\d+)\.pt", path.name) for path in run.glob("checkpoints/step-*.pt"))
    step = max((int(name[1]) for name in names if name), default=0)
    if command.config.max_steps < step:
        raise ValueError(f"max_steps: expected at least {step}, which {run} is at; got {command.config.max_steps}")


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained model: a picture with a row per class, or the images themselves."""

    run: tyro.conf.Positional[Path]
    """folder of a run or of a saved model, or the name of one on the Hugging Face hub"""
    out: Path = Path("samples.png")
    """a picture (.png) or uint8 images with their labels (.npz)"""
    num: int = 80
    """images to draw; a picture has them in a row for each class, or in rows of eight"""
    labels: tuple[int, ...] = ()
    """classes to draw, -1 for no label; by default all of them in turn, in a picture ten at most"""
    guidance: float = 0.0
    """weight of guidance; 0 for none"""
    schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0
    """of the attention in the reference branch of guidance"""
    guide: Literal["both", "alpha", "mu"] = "both"
    """the parameters that are guided"""
    drop_label: bool = True
    """whether the reference branch drops the label"""
    sigma: float | None = None
    """standard deviation of the noise to remove; by default that of training, 0 leaves it"""
    quantization: Quantization | None = None
    """to 8-bit pixels: round (default after Gaussian noise), floor (default after others) or truncate, as published"""
    on_nan: Literal["fail", "redraw", "keep"] = "fail"
    """what to do about samples that are not finite"""
    trajectory: Path | None = None
    """also draw the image after every block, into this file"""
    decoder: Literal[NAMES] = "auto"
    """auto is the faster of the two for each block, where `tarflow calibrate` has timed them"""
    window: int | None = None
    """tokens of an image that the jacobi decoder updates at once; by default all of them"""
    tolerance: float | None = None
    """of the jacobi decoder: by how much each latent may differ from the one that was drawn; by default 0.01"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the transformers"""
    seed: int = 0
    device: str = "auto"


def run_sample(arguments: Sequence[str]) -> None:
    """``sample``."""
    command, given = _parse(Sample, arguments), _given(Sample, arguments)
    _check_sample(command, given)
    decoder = Decoder(command.decoder, command.window, command.tolerance)
    _check_weight(command.guidance)
    guidance = Guidance(command.guidance, command.schedule, command.temperature, command.guide, command.drop_label)
    model, info = _load(command.run, command.device)
    if isinstance(model, FlowPP):
        _refuse_decoding(command, given)
    _check_labels(command.labels, model.config.num_classes)
    model.check_num(command.num)
    sigma = info.get("sigma", 0.0) if command.sigma is None else command.sigma
    gallery = Gallery(
        info.get("class_names", ()),
        guidance if guidance.weight else None,
        sigma,
        decoder,
        command.seed,
        command.quantization or quantization(info.get("sigma", 0.0)),
        command.on_nan,
    )
    with _in_precision(command, model), _Progress(command.num, getattr(model.config, "num_blocks", 1)) as progress:
        if command.out.suffix == ".png":
            name = command.run.resolve().name
            gallery.samples(model, command.out, f"Samples of {name}", command.num, command.labels, progress.report)
        else:
            _save_arrays(gallery, model, command, progress.report)
    print(progress.summary())
    if command.trajectory:
        with _in_precision(command, model):
            gallery.trajectory(model, command.trajectory, "From latent to image", command.labels[:10])
    print(f"wrote {', '.join(str(path) for path in (command.out, command.trajectory) if path)}")


def _check_sample(command: Sample, given: dict[str, str]) -> None:
    """ValueError or OSError for what no model can be asked for, before one is read."""
    if command.out.suffix not in (".png", ".npz"):
        raise ValueError(f"out: expected a .png or .npz file; got {command.out}")
    _check_file("out", command.out)
    if command.trajectory is not None:
        formats = FigureCanvasBase.get_supported_filetypes()
        if command.trajectory.suffix[1:] not in formats:
            raise ValueError(f"trajectory: expected a picture ({', '.join(formats)}); got {command.trajectory}")
        if command.trajectory.resolve() == command.out.resolve():
            raise ValueError(f"trajectory: expected another file than --out; got {command.trajectory} for both")
        _check_file("trajectory", command.trajectory)
    if command.num < 1:
        raise ValueError(f"num: expected at least 1; got {command.num}")
    _check_seed(command.seed)
    if command.sigma is not None:
        check_sigma("sigma", command.sigma)
    for name in ("schedule", "temperature", "guide", "drop_label"):
        if name in given and "guidance" not in given:
            value = getattr(command, name)
            raise ValueError(f"{name}: expected none without --guidance, a part of which it is; got {value}")
    if "tolerance" in given and command.decoder == "sequential":
        raise ValueError(f"tolerance: expected none for the sequential decoder; got {command.tolerance}")
    if "labels" in given and not 0 < len(command.labels) <= command.num:
        raise ValueError(f"labels: expected 1 to {command.num} classes, as --num says; got {len(command.labels)}")


def _refuse_decoding(command: Sample, given: dict[str, str]) -> None:
    """ValueError for a flag that only a TarFlow has a use for."""
    of_guidance = ("guidance", "schedule", "temperature", "guide", "drop_label")
    for name in ("labels", "sigma", *of_guidance, "decoder", "window", "tolerance"):
        if name in given:
            value = getattr(command, name)
            raise ValueError(f"{name}: expected none for a Flow++, which has no use for it; got {value!r}")


def _check_labels(labels: Sequence[int], num_classes: int) -> None:
    """ValueError where a model has no such classes."""
    if labels and not num_classes:
        raise ValueError(f"labels: expected none for an unconditional model; got {', '.join(map(str, labels))}")
    for label in labels:
        if not -1 <= label < num_classes:
            raise ValueError(f"labels: expected classes from 0 to {num_classes - 1}, or -1 for no label; got {label}")


def _check_weight(weight: float) -> None:
    """ValueError, by the name of the flag, for a weight that :class:`Guidance` has not."""
    if not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(f"guidance: expected a number from 0 to {MAX_WEIGHT}; got {weight}")


def _check_seed(seed: int) -> None:
    """ValueError where PyTorch has no generator of that seed."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1; got {seed}")


def _check_file(name: str, path: Path) -> None:
    """OSError where a file cannot be written: said before the work, not after it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name}: expected a file in a folder that exists; got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file; got the folder {path}")
    _check_writable(name, path.parent)


def _check_new(name: str, folder: Path) -> None:
    """OSError where a folder could not be made, or is none."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{name}: expected a folder; got {folder}, and {place} is a file")
    _check_writable(name, place)


def _check_writable(name: str, folder: Path) -> None:
    """OSError where there is no such folder, or nothing can be written to it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: expected a folder to write to; got {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{name}: expected a folder that can be written to; got {folder}")


class _Progress:
    """A bar of images that moves with every block, and what decoding them took."""

    def __init__(self, num: int, num_blocks: int):
        self.num, self.num_blocks = num, num_blocks
        self.decoded: list[BlockStatistics] = []

    def __enter__(self) -> "_Progress":
        layout = "{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        self.bar = tqdm(total=self.num, unit=" images", dynamic_ncols=True, bar_format=layout)
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def report(self, decoded: BlockStatistics) -> None:
        """A block is done."""
        self.decoded.append(decoded)
        self.bar.set_postfix_str(f"block {decoded.block + 1}: {decoded.decoder}, {decoded.passes} passes")
        self.bar.update(decoded.batch / self.num_blocks)

    def summary(self) -> str:
        """Such as ``80 images in 3.1 s, 26 images/s; 73 passes for 780 sequential steps (1/10.7): jacobi``."""
        seconds = self.bar.format_dict["elapsed"]
        if not self.decoded:  # a Flow++ has no steps to report
            return f"{self.num} images in {seconds:.3g} s, {self.num / seconds:.3g} images/s"
        images = sum(decoded.batch for decoded in self.decoded) / self.num_blocks
        passes, steps = (sum(getattr(decoded, what) for decoded in self.decoded) for what in ("passes", "steps"))
        decoders = {decoded.block: str(decoded.decoder) for decoded in self.decoded}
        how = ", ".join(f"{decoder} (block {t + 1})" for t, decoder in decoders.items())
        if len(set(decoders.values())) == 1:
            (how,) = set(decoders.values())
        return (
            f"{images:.0f} images in {seconds:.3g} s, {images / seconds:.3g} images/s; "
            f"{passes} passes for {steps} sequential steps (1/{steps / max(passes, 1):.3g}): {how}"
        )


def _save_arrays(gallery: Gallery, model: ImageFlow, command: Sample, progress: ProgressCallback) -> None:
    """Images uint8 (num, H, W, C) and labels int64 (num,), the classes in turn."""
    labels = None
    if model.config.num_classes:
        classes = torch.tensor(command.labels or range(model.config.num_classes))
        labels = classes.repeat(-(-command.num // len(classes)))[: command.num]
    (images,) = gallery.draw(model, command.num, labels, progress=progress)
    arrays = {"images": to_pixels(images, gallery.quantization).permute(0, 2, 3, 1).cpu().numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    with atomic_write(command.out) as path, path.open("wb") as file:
        np.savez_compressed(file, **arrays)


@dataclass(frozen=True)
class Calibrate:
    """Time the decoders on every block of a model, so that `--decoder auto` takes the faster one from now on."""

    run: tyro.conf.Positional[Path]
    """folder of a run or of a saved model, where calibration.json is written"""
    guidance: float | None = None
    """weight of guidance; by default the guidance is that of the samples in training, or 2 for a model with classes"""
    temperature: float | None = None
    """of the attention in the reference branch of guidance; by default that of the samples in training, or 1"""
    tolerance: float = TOLERANCE
    """of the jacobi decoder"""
    batches: tuple[int, ...] = calibration.BATCHES
    """how many images at a time"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the transformers"""
    device: str = "auto"


def run_calibrate(arguments: Sequence[str]) -> None:
    """``calibrate``: prints the timings and writes them beside the weights."""
    command = _parse(Calibrate, arguments)
    if not command.batches or min(command.batches) < 1:
        raise ValueError(f"batches: expected positive numbers; got {command.batches}")
    _check_writable("run", command.run)
    Decoder("jacobi", tolerance=command.tolerance)
    model, info = _load(command.run, command.device)
    if not isinstance(model, TarFlow):
        raise ValueError(f"run: expected a TarFlow, whose decoders there are to time; {command.run} holds a Flow++")
    if info.get("train"):
        guidance = _read_run(command.run).sample_guidance or Guidance(0.0)
    else:
        guidance = Guidance(2.0 if model.config.num_classes else 0.0)
    if command.guidance is not None:
        _check_weight(command.guidance)
    told = {"weight": command.guidance, "temperature": command.temperature}
    guidance = replace(guidance, **{name: value for name, value in told.items() if value is not None})
    guidance.check(model.config.num_classes)
    largest = max(command.batches)
    hardware.check_memory(largest * model.config.decoding_bytes(), model.device, f"batches of {largest}")
    print("rows  block  decoder              passes    seconds")

    def show(timing: calibration.Timing) -> None:
        decoder = Decoder(timing.decoder, timing.window)
        print(
            f"{timing.rows:4}  {timing.block + 1:5}  {decoder!s:20} {timing.passes:6} {timing.seconds:10.4f}",
            flush=True,
        )

    with _in_precision(command, model):
        timings = calibration.calibrate(model.flow, guidance, command.tolerance, command.batches, show)
    calibration.save(command.run, timings)
    print(f"wrote {command.run / calibration.FILE}")


@dataclass(frozen=True)
class Evaluate:
    """Score a trained model on test images: bits/dim, and accuracy of classification by Bayes' rule."""

    run: tyro.conf.Positional[Path]
    """folder of a run"""
    num_images: int = 1000
    """test images to score, evenly spread over the split"""
    draws: int = 4
    """draws of dequantization noise per image, importance-weighted"""
    batch_size: int = 64
    dataset: str | None = None
    """by default that of training"""
    data_dir: Path | None = None
    image_size: int | None = None
    resize: Literal[tuple(datasets.RESIZE)] | None = None
    """filter that resizes the images of a folder; by default that of training"""
    seed: int = 0
    device: str = "auto"


def run_evaluate(arguments: Sequence[str]) -> None:
    """``evaluate``: prints the scores and writes them to ``evaluation.json`` in the run's folder."""
    command = _parse(Evaluate, arguments)
    for name in ("num_images", "draws", "batch_size"):
        if getattr(command, name) < 1:
            raise ValueError(f"{name}: expected at least 1; got {getattr(command, name)}")
    if command.draws > MOST_DRAWS:
        raise ValueError(f"draws: expected at most {MOST_DRAWS}; got {command.draws}")
    _check_seed(command.seed)
    _check_writable("run", command.run)
    model, info = _load(command.run, command.device)
    trained = info.get("train", {})
    dataset = datasets.load(
        trained.get("dataset", "fashion-mnist") if command.dataset is None else command.dataset,
        "test",
        command.data_dir or trained.get("data_dir"),
        trained.get("image_size") if command.image_size is None else command.image_size,
        command.resize or trained.get("resize", "lanczos"),
    )
    if model.config.num_classes and not dataset.num_classes:
        raise ValueError(f"dataset: expected labels for a model that is conditional on them; got {dataset.source}")
    chosen = command.dataset is not None or command.data_dir is not None or command.image_size is not None
    check_scored(info.get("data"), dataset, chosen)
    scores = evaluation.evaluate(
        model,
        *dataset.fetch(spread(len(dataset), command.num_images)),
        sigma=info.get("sigma", 0.0),
        draws=command.draws,
        batch_size=command.batch_size,
        seed=command.seed,
    )
    print(f"{dataset.source}; {min(command.num_images, len(dataset)):,} of them, mean ± standard error over images")
    for name, estimate in scores.items():
        print(f"{estimate}   {name}")
    with atomic_write(command.run / "evaluation.json") as path:
        rows = {name: asdict(estimate) for name, estimate in scores.items()}
        path.write_text(
            json.dumps({"data": dataset.source, "settings": asdict(command), "scores": rows}, indent=2, default=str)
        )


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint of the paper's code (.pth) to a folder that all commands and from_pretrained read."""

    checkpoint: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    in_channels: int = 3
    """channels of the images, which the weights do not tell"""
    sigma: float = 0.0
    """standard deviation of the noise in training, the last number in the name of a published file"""


def run_convert(arguments: Sequence[str]) -> None:
    """``convert``."""
    command = _parse(Convert, arguments)
    check_sigma("sigma", command.sigma)
    _check_new("out", command.out)
    if (command.out / "config.json").exists():
        raise FileExistsError(f"out: {command.out} already holds a model; choose another folder")
    model = load_published(command.checkpoint, command.in_channels)
    model.save_pretrained(command.out, sigma=command.sigma)
    print(f"wrote {command.out}: {model.config}")


def _in_precision(command: Sample | Calibrate, model: ImageFlow) -> torch.autocast:
    """Autocast to the precision asked for; ValueError for a model in float64, which autocast leaves as it is."""
    low = command.precision == "bfloat16"
    if low and model.dtype == torch.float64:
        raise ValueError(f"precision: expected float32 for {command.run}, a model in float64; got bfloat16")
    return torch.autocast(model.device.type, torch.bfloat16, enabled=low)


def _load(run: Path, device: str) -> tuple[ImageFlow, dict]:
    """The model, and what its config.json says beside its shape."""
    model, settings = load_pretrained(run)
    return model.to(pick_device(device)), settings


def _read_run(folder: Path) -> TrainConfig:
    """The settings of a run; ValueError where there is none."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"resume: expected the folder of a run; {folder / 'config.json'} does not exist")
    settings = read_config(folder).get("train")
    if settings is None:
        raise ValueError(f"resume: {folder} holds a model without a training run")
    try:
        return TrainConfig.read(settings)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: settings of another version of tarflow: {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _new_folder(parent: Path, name: str) -> Path:
    """``parent/name``, or the first of ``name-2``, ... that was not taken; made, so that no other run gets it too."""
    folder, number = parent / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = parent / f"{name}-{number}"
        else:
            return folder


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": run_train,
    "sample": run_sample,
    "calibrate": run_calibrate,
    "evaluate": run_evaluate,
    "convert": run_convert,
}

USAGE = """usage: tarflow COMMAND ...

  train                  train a model; without flags, on Fashion-MNIST
  sample RUN             draw samples from a trained model
  calibrate RUN          time the decoders, for the fastest samples
  evaluate RUN           score a trained model on test images
  convert CKPT OUT       convert a published checkpoint

tarflow COMMAND --help lists its flags."""
