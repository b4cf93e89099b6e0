"""A training run and its folder: evaluation, samples, checkpoints and curves on a schedule around the trainer.

A run folder holds ``config.json``, ``model.safetensors`` (the averaged weights), ``metrics.jsonl``, ``samples.png``,
``trajectory.png``, ``curves.png``, ``checkpoints/``, the events of TensorBoard and ``.lock``, see :func:`hold`.
"""

import contextlib
import errno
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .. import datasets, evaluation, hardware, pictures
from ..datasets import Folder, Images
from ..files import atomic_write, name_full_disk, remove_abandoned
from ..gallery import Gallery, spread
from ..hardware import pick_device, uses_bfloat16
from ..image_flow import ImageFlow
from ..noise import quantization
from ..pretrained import read_config, write_config
from . import checkpoints
from .config import FIXED_ON_RESUME, TrainConfig
from .trainer import MEASURES, Trainer, build

try:
    import fcntl
except ImportError:
    fcntl = None

EVALUATED_IMAGES = 1000


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


def train(config: TrainConfig, out: Path, resume: bool = False) -> ImageFlow:
    """Train, or go on training, in the folder ``out``; returns the averaged model.

    On Ctrl-C or SIGTERM it finishes the step, writes a checkpoint and raises KeyboardInterrupt. Where a batch cannot be
    read it writes a checkpoint first, too. A run without a checkpoint has learned nothing: its folder may be trained in
    anew, and resumed under any settings.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not given.
        BlockingIOError: another process trains in ``out``.
        ValueError: a resumed run is of another configuration or other data; a checkpoint or a dataset is damaged; a
            step does not fit in memory.
        Diverged: too many steps in a row were not finite.
        OSError: a file cannot be written; those that were there before are intact. A process that reads images died.
    """
    if config.data_dir is not None:  # so that the run finds it from wherever it is resumed or evaluated
        config = replace(config, data_dir=config.data_dir.absolute())
    with hold(out):
        if not resume:
            refuse_taken(out)
        remove_abandoned(out)
        remove_abandoned(out / "checkpoints")
        train_set, test_set = (
            datasets.load(config.dataset, split, config.data_dir, config.image_size, config.resize)
            for split in ("train", "test")
        )
        device = pick_device(config.device)
        print(describe(config, train_set, device), flush=True)
        with memory_errors_named(config):
            trainer = Trainer(config, train_set, device)
            run = Run(out, trainer, train_set, test_set)
            if resume:
                run.resume()
            batches = datasets.batches(train_set, config.batch_size, config.seed, trainer.step)
            with contextlib.closing(batches):
                run.train(batches)
    return trainer.average


class Run:
    """The folder of a run, and what is written to it when."""

    def __init__(self, folder: Path, trainer: Trainer, train_set: Images | Folder, test_set: Images | Folder):
        self.folder = folder
        self.trainer = trainer
        self.config = trainer.config
        self.train_set = train_set
        self.data = {"train": datasets.fingerprint(train_set), "test": datasets.fingerprint(test_set)}
        self.test_pixels, test_labels = test_set.fetch(spread(len(test_set), EVALUATED_IMAGES))
        self.test_labels = test_labels if self.config.conditional else None
        self.test_source = test_set.source
        self.measures: list[dict[str, Tensor]] = []
        conditional = self.config.conditional
        self.gallery = Gallery(
            self.train_set.class_names if conditional else (),
            self.config.sample_guidance,
            self.config.noise_sigma,
            seed=self.config.seed,
            quantization=quantization(self.config.noise_sigma),
            on_nan="keep",
        )

    def resume(self) -> None:
        """Take the state of the newest checkpoint, where there is one.

        Raises:
            ValueError: it is damaged, or of another configuration or other data; nothing has changed then.
        """
        state = checkpoints.load_latest(self.folder / "checkpoints")
        if state is None:
            if (self.folder / "model.safetensors").exists():
                raise ValueError(f"resume: expected a checkpoint in {self.folder / 'checkpoints'}; got none")
            return
        settings = read_config(self.folder)
        before = TrainConfig.read(settings["train"])
        for name in FIXED_ON_RESUME:
            if getattr(before, name) != getattr(self.config, name):
                raise ValueError(
                    f"{name}: a checkpoint of another configuration; expected {getattr(before, name)!r} as in "
                    f"{self.folder}, got {getattr(self.config, name)!r}"
                )
        for split, data in _recorded(settings.get("data", {})).items():
            if data["digest"] != self.data[split]["digest"]:
                raise ValueError(
                    f"data_dir: expected the {split} images that {self.folder} was begun with, {_named(data)}; "
                    f"got {_named(self.data[split])}"
                )
        try:
            measures = _unstack(state.pop("measures", {}) if isinstance(state, dict) else {})
            self.trainer.load_state_dict(state)
        except ValueError as error:
            path = checkpoints.checkpoints(self.folder / "checkpoints")[-1]
            raise ValueError(f"resume: {path} is no checkpoint of this run; {error}") from error
        self.measures = measures

    def train(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """All steps that are left, and what is to be done between and after them."""
        trainer, config = self.trainer, self.config
        self._begin()
        with stop_signals() as stopped, self.logging():
            if trainer.step and trainer.step % config.evaluate_every == 0 and not self._is_last:
                self.evaluate()
            while not self._is_last and not stopped():
                try:
                    batch = next(batches)
                except (ValueError, OSError):
                    if trainer.step:
                        self.save()
                        print(f"saved   step {trainer.step}; go on with --resume {self.folder}", flush=True)
                    raise
                self.log(trainer.train_step(*batch))
                self.on_schedule()
            if not self._is_last:
                self.save()
                raise KeyboardInterrupt(f"stopped at step {trainer.step}; go on with --resume {self.folder}")
            self.finish()

    def _begin(self) -> None:
        """Write the settings, and forget what was logged after the checkpoint that the run goes on from."""
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            rows = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [row for row in rows if self._is_kept(row)]
            with atomic_write(metrics) as path:
                path.write_text("".join(kept))
        self._write_settings()
        print(f"run     {self.folder}, steps {self.trainer.step} to {self.config.max_steps}", flush=True)

    def _is_kept(self, row: str) -> bool:
        """Whether the run, had it not been interrupted, would have logged this by now.

        Not so the evaluation at this very step, which is repeated; nor a row of the last step where it is the last no
        more, whose measures the checkpoint holds.
        """
        try:
            row = json.loads(row)
            at, on = row["step"], self.trainer.step
            return at < on or (at == on and "loss" in row and (on % self.config.log_every == 0 or self._is_last))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'metrics.jsonl'}: expected rows with a step; got {row!r:.60}") from error

    @property
    def _is_last(self) -> bool:
        return self.trainer.step >= self.config.max_steps

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Keep the events and the progress bar open."""
        step = self.trainer.step
        self.since, self.since_step = time.perf_counter(), step
        with (
            name_full_disk(self.folder),
            errors_of_threads_raised_once(),
            SummaryWriter(str(self.folder), purge_step=step + 1) as self.writer,
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
        due = step % config.log_every == 0
        if not due and not self._is_last:
            return
        # One transfer for all of them.
        values = torch.stack([torch.stack(list(row.values())).float() for row in self.measures]).cpu()
        row = dict(zip(measures, values.mean(0).tolist(), strict=True))
        last = dict(zip(measures, values[-1].int().tolist(), strict=True))
        row["bad_steps"], row["bad_in_a_row"] = last["bad_steps"], last["bad_in_a_row"]
        now = time.perf_counter()
        row["images_per_second"] = (step - self.since_step) * config.batch_size / (now - self.since)
        row["learning_rate"] = self.trainer.optimizer.param_groups[0]["lr"]
        self.since, self.since_step = now, step
        if due:  # else a run that is made longer goes on with them
            self.measures = []
        self._write_row(row)
        self.bar.set_postfix_str(
            f"loss {row['loss']:.4f}, {row['bits_per_dim']:.3f} bits/dim, {row['images_per_second']:.0f} images/s",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        if (bad := last["bad_in_a_row"]) >= config.max_bad_steps:
            saved = map(checkpoints.step_of, checkpoints.checkpoints(self.folder / "checkpoints"))
            before = ", ".join(str(at) for at in saved if at <= step - bad) or "none"
            raise Diverged(
                f"training diverged: the last {bad} steps had a loss or gradient that is not finite, "
                f"and were skipped; try a learning rate below {config.learning_rate:g}; "
                f"checkpoints from before them: {before}"
            )

    def on_schedule(self) -> None:
        """Evaluate, sample and save, each when its time has come; the last step is :meth:`finish`'s.

        What follows a step that was not finite is not worth a checkpoint, and may end in :class:`Diverged`.
        """
        step, config = self.trainer.step, self.config
        if self._is_last:
            return
        began = time.perf_counter()
        if step % config.evaluate_every == 0:
            self.evaluate()
        if step % config.sample_every == 0:
            self.sample()
        if step % config.checkpoint_every == 0 and not self.trainer.bad_in_a_row:
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
        """A checkpoint, and the averaged weights; then the oldest goes, but none from before steps that are not finite.

        With it are the measures that are yet to be averaged into a row.
        """
        folder, trainer = self.folder / "checkpoints", self.trainer
        measures = {name: torch.stack([row[name] for row in self.measures]) for name in self.measures[:1] and MEASURES}
        checkpoints.save(folder, trainer.step, trainer.state_dict() | {"measures": measures})
        trainer.average.save_weights(self.folder / "model.safetensors")
        if not trainer.bad_in_a_row:
            checkpoints.rotate(folder, self.config.keep_checkpoints)

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
            f"{weighted} by {draws} importance-weighted ones; {self.test_source}",
            flush=True,
        )

    def _write_settings(self) -> None:
        write_config(
            self.folder,
            **self.trainer.model.config_dict(),
            sigma=self.config.noise_sigma,
            class_names=self.gallery.class_names,
            train=asdict(self.config),
            data=self.data,
        )

    def _write_row(self, row: dict[str, float]) -> None:
        row = {"step": self.trainer.step, **row}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, self.trainer.step)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes from training in it; if it stays empty it is removed.

    The lock is on a file in it and ends with the process, however that ends. Where there are no such locks, none is
    taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a") as file:
        try:
            # Not flock, whose locks are inherited: a reader outlives a trainer that is killed by some seconds.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(f"out: another process trains in {folder}; choose another folder") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [*folder.iterdir()] == [path]:
                    path.unlink()
                    folder.rmdir()


@contextlib.contextmanager
def errors_of_threads_raised_once() -> Iterator[None]:
    """Within the block no thread prints what it could not write: TensorBoard's raises it in the main thread, too."""
    previous = threading.excepthook
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else previous(args)
    try:
        yield
    finally:
        threading.excepthook = previous


def refuse_taken(folder: Path) -> None:
    """FileExistsError where a folder holds a model, or a run with anything learned."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if checkpoints.checkpoints(folder / "checkpoints") or (
        config.exists() and (weights.exists() or "train" not in read_config(folder))
    ):
        raise FileExistsError(f"out: {folder} already holds a run; choose another folder, or --resume it")


@contextlib.contextmanager
def memory_errors_named(config: TrainConfig) -> Iterator[None]:
    """ValueError, one line, in place of what PyTorch says where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(
            f"batch_size: expected steps that fit in memory; {config.batch_size} images of this model do not"
        ) from error


def check_scored(data: dict[str, Any] | None, dataset: Images | Folder, chosen: bool) -> None:
    """Whether test images may be scored: those that belong to what a run was trained on, its ``data`` in config.json.

    Others, where the user has ``chosen`` them, with a warning on stderr: they may be training images all the same, as
    those of Fashion-MNIST's shipped subset are in the whole. What was trained on itself is always refused.

    Raises:
        ValueError: they may not.
    """
    if data is None:  # a run from before this was recorded, or no run
        return
    data, scored = _recorded(data), datasets.fingerprint(dataset)
    if scored["digest"] == data["train"]["digest"]:
        raise ValueError(f"dataset: expected other images than the run was trained on; got {_named(scored)}")
    if scored["digest"] == data["test"]["digest"]:
        return
    what = (
        f"expected the test images of the data that the run was trained on, {_named(data['test'])}; "
        f"got {_named(scored)}, some of which it may have been trained on"
    )
    if not chosen:
        raise ValueError(f"data_dir: {what}")
    print(f"warning: {what}", file=sys.stderr)


def _recorded(data: dict[str, Any]) -> dict[str, Any]:
    """The data that config.json names, or nothing; ValueError where that is not what a run has written there."""
    kinds = {"source": str, "images": int, "classes": int, "digest": str}
    for split in ("train", "test") if data != {} else ():
        part = data.get(split) if isinstance(data, dict) else None
        if not isinstance(part, dict) or any(not isinstance(part.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(f"config.json: data: expected {', '.join(kinds)} of the {split} images; got {part!r:.80}")
    return data


def _named(data: dict[str, Any]) -> str:
    """What tells data from other data, for a message."""
    return f"{data['source']} ({data['images']:,} in {data['classes']} classes, digest {data['digest'][:8]})"


def _unstack(measures: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Those of each step, as :meth:`Run.save` stacked them; ValueError where they are none."""
    if not measures:
        return []
    sound = isinstance(measures, dict) and set(measures) == set(MEASURES)
    if not sound or any(not isinstance(part, Tensor) or part.dim() != 1 for part in measures.values()):
        raise ValueError(f"state.measures: expected a tensor (n,) for each of {', '.join(MEASURES)}")
    return [dict(zip(MEASURES, step, strict=True)) for step in zip(*(measures[name] for name in MEASURES), strict=True)]


def describe(config: TrainConfig, dataset: Images | Folder, device: torch.device) -> str:
    """What is about to be trained, on what, and what it takes; makes nothing."""
    with torch.device("meta"):
        model = build(config, dataset)
    shape, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    bfloat16 = uses_bfloat16(config.precision, device)
    total = hardware.training_bytes(shape.activation_bytes(2 if bfloat16 else 4), parameters, config.batch_size)
    hardware.check_memory(total, device, f"training at batch size {config.batch_size}")
    noise = f"Gaussian noise of sigma {config.sigma}" if config.noise == "gaussian" else f"{config.noise} noise"
    return (
        f"data    {dataset.source}; {noise}\n"
        f"model   {shape.summary}, {parameters / 1e6:.1f}M parameters\n"
        f"memory  about {total / 2**30:.1f} GiB at batch {config.batch_size}\n"
        f"device  {device}, {'transformers' if config.model == 'tarflow' else 'conditioners'} in "
        f"{'bfloat16' if bfloat16 else 'float32'}"
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT and SIGTERM are noted for the loop to stop at; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt("interrupted at once")
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
