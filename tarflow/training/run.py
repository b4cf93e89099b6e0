"""A training run and its folder: evaluation, samples, checkpoints and curves on a schedule around the trainer.

A run folder holds ``config.json``, ``model.safetensors`` (the averaged weights), ``metrics.jsonl``, ``samples.png``,
``trajectory.png``, ``curves.png``, ``checkpoints/`` and the events of TensorBoard.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .. import datasets, evaluation, memory, pictures
from ..datasets import Folder, Images
from ..files import replacing
from ..gallery import Gallery, spread
from ..guidance import Guidance
from ..image_flow import ImageFlow, read_config
from . import checkpoints
from .config import FIXED_ON_RESUME, TrainConfig
from .trainer import Trainer, build, uses_bfloat16

EVALUATED_IMAGES = 1000


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


def train(config: TrainConfig, out: Path, resume: bool = False) -> ImageFlow:
    """Train, or go on training, in the folder ``out``; returns the averaged model.

    On Ctrl-C or SIGTERM it finishes the step, writes a checkpoint and raises KeyboardInterrupt.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not given.
        ValueError: a resumed run is of another configuration; a checkpoint or a dataset is damaged.
        Diverged: too many steps in a row were not finite.
        OSError: a file cannot be written; those that were there before are intact.
    """
    train_set, test_set = (
        datasets.load(config.dataset, split, config.data_dir, config.image_size) for split in ("train", "test")
    )
    device = pick_device(config.device)
    print(describe(config, train_set, device), flush=True)
    trainer = Trainer(config, train_set, device)
    run = Run(out, trainer, train_set, test_set)
    if resume:
        run.resume()
    batches = datasets.batches(train_set, config.batch_size, config.seed, start=trainer.step)
    if not resume:
        run.create()
    print(f"run     {out}, steps {trainer.step} to {config.max_steps}", flush=True)
    with stop_signals() as stopped, run.logging():
        while trainer.step < config.max_steps and not stopped():
            run.log(trainer.train_step(*next(batches)))
            run.on_schedule()
        if trainer.step < config.max_steps:
            run.save()
            raise KeyboardInterrupt(f"stopped at step {trainer.step}; go on with --resume {out}")
        run.finish()
    return trainer.average


class Run:
    """The folder of a run, and what is written to it when."""

    def __init__(self, folder: Path, trainer: Trainer, train_set: Images | Folder, test_set: Images | Folder):
        self.folder = folder
        self.trainer = trainer
        self.config = trainer.config
        self.train_set = train_set
        self.test_pixels, test_labels = test_set.fetch(spread(len(test_set), EVALUATED_IMAGES))
        self.test_labels = test_labels if self.config.conditional else None
        self.measures: list[dict[str, Tensor]] = []
        conditional = self.config.conditional
        self.gallery = Gallery(
            self.train_set.class_names if conditional else (),
            Guidance(self.config.guidance) if conditional and self.config.guidance else None,
            self.config.noise_sigma,
            seed=self.config.seed,
        )

    def create(self) -> None:
        """Claim the folder; FileExistsError where it holds a run already."""
        if (self.folder / "config.json").exists():
            raise FileExistsError(f"out: {self.folder} already holds a run; choose another folder, or --resume it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_settings()

    def resume(self) -> None:
        """Go on from the newest checkpoint, and forget what was logged after it."""
        before = TrainConfig.read(read_config(self.folder)["train"])
        for name in FIXED_ON_RESUME:
            if getattr(before, name) != getattr(self.config, name):
                raise ValueError(
                    f"{name}: a checkpoint of another configuration; expected {getattr(before, name)!r} as in "
                    f"{self.folder}, got {getattr(self.config, name)!r}"
                )
        state = checkpoints.load_latest(self.folder / "checkpoints")
        if state is not None:
            self.trainer.load_state_dict(state)
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            rows = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            with replacing(metrics) as path:
                path.write_text("".join(row for row in rows if json.loads(row)["step"] <= self.trainer.step))
        self._write_settings()

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Keep the events and the progress bar open."""
        step = self.trainer.step
        self.since = time.perf_counter()
        with (
            SummaryWriter(str(self.folder), purge_step=step + 1 if step else None) as self.writer,
            tqdm(
                total=self.config.max_steps,
                initial=step,
                unit="step",
                dynamic_ncols=True,
                mininterval=1 if sys.stderr.isatty() else 30,
            ) as self.bar,
        ):
            yield

    def log(self, measures: dict[str, Tensor]) -> None:
        """Collect the measures of a step on the device; look at them only every ``log_every`` steps."""
        self.measures.append(measures)
        step, config = self.trainer.step, self.config
        if step % config.log_every and step != config.max_steps:
            return
        # One transfer for all of them.
        values = torch.stack([torch.stack(list(row.values())).float() for row in self.measures]).cpu()
        row = dict(zip(measures, values.mean(0).tolist(), strict=True))
        last = dict(zip(measures, values[-1].int().tolist(), strict=True))
        row["bad_steps"], row["bad_in_a_row"] = last["bad_steps"], last["bad_in_a_row"]
        now = time.perf_counter()
        row["images_per_second"] = len(self.measures) * config.batch_size / (now - self.since)
        row["learning_rate"] = self.trainer.optimizer.param_groups[0]["lr"]
        self.since, self.measures = now, []
        self._write_row(row)
        self.bar.set_postfix_str(
            f"loss {row['loss']:.4f}, {row['bits_per_dim']:.3f} bits/dim, {row['images_per_second']:.0f} images/s",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        if last["bad_in_a_row"] >= config.max_bad_steps:
            raise Diverged(
                f"training diverged: the last {last['bad_in_a_row']} steps had a loss or gradient that is not finite, "
                f"and were skipped; try a learning rate below {config.learning_rate:g}. Checkpoints are intact"
            )

    def on_schedule(self) -> None:
        """Evaluate, sample and save, each when its time has come; the last step is :meth:`finish`'s."""
        step, config = self.trainer.step, self.config
        if step == config.max_steps:
            return
        began = time.perf_counter()
        if step % config.evaluate_every == 0:
            self.evaluate()
        if step % config.sample_every == 0:
            self.sample()
        if step % config.checkpoint_every == 0:
            self.save()
        self.since += time.perf_counter() - began

    def evaluate(self) -> None:
        """Bits/dim of test images with the noise of training, under the averaged weights."""
        generator = torch.Generator(self.trainer.device).manual_seed(self.config.seed)
        scored = (self.trainer.average, self.test_pixels, self.test_labels)
        if self.config.noise == "gaussian":
            estimate = evaluation.noisy_bits_per_dim(*scored, sigma=self.config.sigma, generator=generator)
        else:
            estimate = evaluation.bits_per_dim(*scored, generator=generator)
        self._write_row({"eval_bits_per_dim": estimate.mean})

    def sample(self) -> None:
        """``samples.png``, the same latents every time, and ``curves.png``."""
        path = self.folder / "samples.png"
        self.gallery.samples(self.trainer.average, path, f"Samples after {self.trainer.step:,} steps")
        with Image.open(path) as image:
            self.writer.add_image("samples", np.asarray(image.convert("RGB")), self.trainer.step, dataformats="HWC")
        pictures.curves(self.folder / "metrics.jsonl", self.folder / "curves.png", f"Training of {self.folder.name}")

    def save(self) -> None:
        """A checkpoint, and the averaged weights."""
        keep = self.config.keep_checkpoints
        checkpoints.save(self.folder / "checkpoints", self.trainer.step, self.trainer.state_dict(), keep)
        self.trainer.average.save_weights(self.folder / "model.safetensors")

    def finish(self) -> None:
        """Save first, since all else can be made again from that; then the pictures."""
        self.save()
        self.evaluate()
        self.sample()
        self.gallery.trajectory(self.trainer.average, self.folder / "trajectory.png", "From latent to image")
        if self.config.score_draws and not self.config.noise_sigma:
            self._score(self.config.score_draws)

    def _score(self, draws: int) -> None:
        """Print the bounds on bits/dim of the test images that were looked at during training."""
        scored = (self.trainer.average, self.test_pixels, self.test_labels)
        generator = torch.Generator(self.trainer.device).manual_seed(self.config.seed)
        bounds = evaluation.bits_per_dim_of_images(*scored, draws=draws, generator=generator)
        one_sample, weighted = map(evaluation.Estimate.of, bounds)
        print(
            f"score   {one_sample} bits/dim of {len(self.test_pixels):,} test images by one sample, "
            f"{weighted} by {draws} importance-weighted ones",
            flush=True,
        )

    def _write_settings(self) -> None:
        write_config(
            self.folder,
            **self.trainer.model.describe(),
            sigma=self.config.noise_sigma,
            class_names=self.gallery.class_names,
            train=asdict(self.config),
        )

    def _write_row(self, row: dict[str, float]) -> None:
        row = {"step": self.trainer.step, **row}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, self.trainer.step)


def describe(config: TrainConfig, dataset: Images | Folder, device: torch.device) -> str:
    """What is about to be trained, on what, and what it takes; makes nothing."""
    with torch.device("meta"):
        model = build(config, dataset)
    shape, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    bfloat16 = uses_bfloat16(config.precision, device)
    total = memory.training_bytes(shape.activation_bytes(2 if bfloat16 else 4), parameters, config.batch_size)
    memory.check(total, device, f"training at batch size {config.batch_size}")
    noise = f"Gaussian noise of sigma {config.sigma}" if config.noise == "gaussian" else f"{config.noise} noise"
    return (
        f"data    {dataset.source}; {noise}\n"
        f"model   {shape.summary}, {parameters / 1e6:.1f}M parameters\n"
        f"memory  about {total / 2**30:.1f} GiB at batch {config.batch_size}\n"
        f"device  {device}, {'transformers' if config.model == 'tarflow' else 'conditioners'} in "
        f"{'bfloat16' if bfloat16 else 'float32'}"
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the accelerator that PyTorch finds, or the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected auto or a device that PyTorch has here; got {name!r}") from error
    return device


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT and SIGTERM are noted for the loop to stop at; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def write_config(folder: Path, **parts) -> None:
    """``config.json``: the shape of the model, the noise it was trained with, the names of its classes."""
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(parts, indent=2, default=str) + "\n")
