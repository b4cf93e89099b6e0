"""A training run: steps, and between them evaluation, samples and checkpoints, each when its time has come."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from .. import datasets, evaluation, hardware, pictures, processes
from ..datasets import ImageDataset, ImageFolder, evenly_spaced
from ..decoding import calibration
from ..decoding.step import count_branches
from ..encoders import Autoencoder
from ..files import remove_abandoned
from ..flow import TokenFlow
from ..hardware import uses_bfloat16
from ..image_flow import ImageFlow
from ..noise import quantization
from ..pictures import Gallery
from ..pretrained import read_config, write_config
from . import checkpoints, throughput
from .config import TrainConfig, TrainingConfig
from .folder import check_same_data, lock_folder, refuse_taken
from .interruptions import TrainingDiverged, name_memory_errors, stop_signals
from .log import Log
from .timetable import is_due
from .trainer import Trainer, build

__all__ = ["Run", "summarize", "train"]

Diverged = TrainingDiverged  # its name in the last release

EVALUATED_IMAGES = 1000

CALIBRATED_BATCHES = 1, 6, 80
"""Numbers of images that decoders are timed on: one, and those of the pictures of a run."""
CALIBRATION_SECONDS, CALIBRATION_SHARE = 20.0, 0.01
"""Time for that: so many seconds or, of a long training, this share of what it has taken."""


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
        TrainingDiverged: too many steps in a row were not finite.
        OSError: a file cannot be written; those that were there before are intact. A process that reads images died.
    """
    if config.data.data_dir is not None:  # so that the run finds it from wherever it is resumed or evaluated
        config = replace(config, data=replace(config.data, data_dir=config.data.data_dir.absolute()))
    device = processes.pick_device(config.training.device)
    with contextlib.ExitStack() as stack:
        with processes.together():
            if processes.is_main():
                stack.enter_context(lock_folder(out))
                _tidy(out, resume)
        processes.check_same("settings", f"{config} {out}")
        with processes.together():
            data, num_ranks = config.data, processes.num_ranks()
            train_set, test_set = (
                datasets.load(data.dataset, split, data.data_dir, data.image_size, data.resize)
                for split in ("train", "test")
            )
            _check_shares(config)
            summary = summarize(config, train_set, device)
        processes.by_main(lambda: print(summary, flush=True))
        with name_memory_errors(config.training.batch_size):
            with processes.together():
                trainer = Trainer(config, train_set, device)
                run = Run(out, trainer, test_set)
            processes.check_same("data", str(run.data))
            if resume:
                with processes.together():
                    run.resume()
                # Of a folder that is not shared, or not yet listed as it is, each would go on from another step.
                processes.check_same("last checkpoint", str(trainer.step))
            batches = datasets.batches(
                train_set,
                config.training.batch_size,
                config.training.seed,
                trainer.step,
                num_workers=processes.num_readers(),
                rank=processes.rank(),
                num_ranks=num_ranks,
            )
            with contextlib.closing(batches):
                run.train(batches)
    return trainer.average


def _tidy(out: Path, resume: bool) -> None:
    """Refuse a folder that is taken, and remove what is half-written in it."""
    if not resume:
        refuse_taken(out)
    remove_abandoned(out)
    remove_abandoned(out / "checkpoints")
    checkpoints.remove_abandoned(out / "checkpoints")


def _check_shares(config: TrainConfig) -> None:
    """Raise ValueError where a batch has no equal shares for all processes and their parts of an update."""
    batch_size, accumulate, num_ranks = config.training.batch_size, config.training.accumulate, processes.num_ranks()
    if batch_size % (accumulate * num_ranks):
        raise ValueError(
            f"batch_size: expected a multiple of {accumulate * num_ranks}, of {num_ranks} processes and "
            f"{accumulate} parts that each accumulates; got {batch_size}"
        )


class Run:
    """A trainer, and everything that it leaves in a folder."""

    def __init__(self, folder: Path, trainer: Trainer, test_set: ImageDataset | ImageFolder):
        self.folder = folder
        self.trainer = trainer
        self.config, self.settings = trainer.config, trainer.config.training
        self.checkpoints = folder / "checkpoints"
        self.log = Log(folder, self.settings, trainer.device, trainer.model.config)
        self.data = {"train": datasets.fingerprint(trainer.dataset), "test": datasets.fingerprint(test_set)}
        conditional = self.config.data.conditional
        self.test_pixels, test_labels = test_set.get_batch(evenly_spaced(len(test_set), EVALUATED_IMAGES))
        self.test_labels = test_labels if conditional else None
        self.test_source = test_set.source
        self.gallery = Gallery(
            trainer.dataset.class_names if conditional else (),
            self.config.sample_guidance,
            self.settings.noise_sigma,
            seed=self.settings.seed,
            quantization=quantization(self.settings.noise_sigma),
            on_nan="keep",
            denoising=self.settings.denoising,
            autoencoder=Autoencoder.of(trainer.dataset.encoders, trainer.device),
        )

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.trainer.step >= self.settings.max_steps

    def resume(self) -> None:
        """Take the state of the newest checkpoint, where there is one.

        Raises:
            ValueError: it is damaged, or of another configuration or other data; nothing has changed then.
        """
        state = checkpoints.load_latest(self.checkpoints, self.trainer.expected_state())
        if state is None:
            if (self.folder / "model.safetensors").exists():
                raise ValueError(f"resume: expected a checkpoint in {self.checkpoints}; got none")
            return
        self._check_same_settings()
        try:
            self.log.load_state_dict(state.pop("measures", {}) if isinstance(state, dict) else {})
            self.trainer.load_state_dict(state)
        except ValueError as error:
            path = checkpoints.checkpoints(self.checkpoints)[-1]
            raise ValueError(f"resume: {path} is no checkpoint of this run; {error}") from error

    def _check_same_settings(self) -> None:
        """Raise ValueError where the run was begun with another model, other data or other fixed settings."""
        config = read_config(self.folder)
        before = TrainConfig.read(config)
        self._check_equal(dict(before.fixed_settings()), dict(self.config.fixed_settings()))
        check_same_data(self.folder, config.get("data", {}), self.data)
        one, other = before.model, self.trainer.model.config
        self._check_equal({"model": type(one).__name__}, {"model": type(other).__name__})
        self._check_equal(*({part.name: getattr(model, part.name) for part in fields(one)} for model in (one, other)))

    def _check_equal(self, before: dict, now: dict) -> None:
        for name, value in before.items():
            if now[name] != value:
                raise ValueError(
                    f"{name}: a checkpoint of another configuration; expected {value!r} as in {self.folder}, "
                    f"got {now[name]!r}"
                )

    def train(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Do all steps that are left, and what is to be done between and after them."""
        trainer, settings = self.trainer, self.settings
        processes.by_main(self._begin)
        with stop_signals() as is_stopped, self.log.open(trainer.step):
            if trainer.step and is_due(trainer.step, settings.evaluate_every) and not self.is_complete:
                with self.log.timed("evaluate"):
                    self._by_main(self.evaluate)
            while not self.is_complete and not processes.anywhere(is_stopped()):
                batch = self._next_batch(batches)
                with self.log.profiled(trainer.step):
                    measures = trainer.train_step(*batch)
                bad_in_a_row = self.log.add(trainer.step, measures, trainer.optimizer.param_groups[0]["lr"])
                if bad_in_a_row >= settings.max_bad_steps:
                    raise self._diverged(bad_in_a_row)
                if not self.is_complete:
                    self.on_schedule()
            if not self.is_complete:
                self.save()
                raise KeyboardInterrupt(f"stopped at step {trainer.step}; go on with --resume {self.folder}")
            self.finish()

    def _begin(self) -> None:
        self.log.forget_after(self.trainer.step)
        self.write_settings()
        print(f"run     {self.folder}, steps {self.trainer.step} to {self.settings.max_steps}", flush=True)

    def _by_main(self, *works: Callable[[], None]) -> None:
        """Do work that looks at the average, which all processes gather for it, in the main one."""
        _ = self.trainer.average
        for work in works:
            processes.by_main(work)

    def _next_batch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The next batch; where a process cannot read its share, what was learned is saved first."""
        began = time.perf_counter()
        try:
            with processes.together():
                batch = next(batches)
        except (ValueError, OSError):
            if self.trainer.step:
                self.save()
                saved = f"saved   step {self.trainer.step}; go on with --resume {self.folder}"
                processes.by_main(lambda: print(saved, flush=True))
            raise
        self.log.waited += time.perf_counter() - began
        return batch

    def _diverged(self, bad: int) -> TrainingDiverged:
        saved = map(checkpoints.step_of, checkpoints.checkpoints(self.checkpoints))
        before = ", ".join(str(step) for step in saved if step <= self.trainer.step - bad) or "none"
        return TrainingDiverged(
            f"training diverged: the last {bad} steps had a loss or gradient that is not finite, "
            f"and were skipped; try a learning rate below {self.settings.learning_rate:g}; "
            f"checkpoints from before them: {before}"
        )

    def on_schedule(self) -> None:
        """Evaluate, sample and save, each when its time has come; after the last step :meth:`finish` does it.

        A step that was not finite is not worth a checkpoint, and training may be about to give up.
        """
        step, settings = self.trainer.step, self.settings
        if is_due(step, settings.evaluate_every):
            with self.log.timed("evaluate"):
                self._by_main(self.evaluate)
        if is_due(step, settings.sample_every):
            with self.log.timed("sample"):
                self._by_main(self.sample)
        if step % settings.checkpoint_every == 0 and not self.trainer.bad_in_a_row:
            with self.log.timed("save"):
                self.save()

    def finish(self) -> None:
        """Save first, since all else can be made again from that; then score, draw and time."""
        self.save()
        self._by_main(self.evaluate, self.sample, self._draw_trajectory)
        if self.settings.importance_samples and not self.settings.noise_sigma:
            self._by_main(self.score)
        if self.settings.calibrate and len(self.trainer.model.decoders) > 1:
            self._by_main(self.calibrate)

    def evaluate(self) -> None:
        """Log the bits/dim of test images with the noise of training, under the averaged weights."""
        scored = (self.trainer.average, self.test_pixels, self.test_labels)
        if self.settings.noise == "gaussian":
            estimate = evaluation.noisy_bits_per_dim(*scored, sigma=self.settings.sigma, generator=self._generator())
        else:
            estimate = evaluation.bits_per_dim(*scored, generator=self._generator())
        self.log.write(self.trainer.step, {"eval_bits_per_dim": estimate.mean})

    def sample(self) -> None:
        """Draw ``samples.png``, from the same latents every time, and ``curves.png``."""
        step, path = self.trainer.step, self.folder / "samples.png"
        self.gallery.save_samples(self.trainer.average, path, f"Samples after {step:,} steps")
        self.log.write_picture(step, "samples", path)
        pictures.curves(self.log.path, self.folder / "curves.png", f"Training of {self.folder.name}")
        tqdm.write(f"drew    {path} after {step:,} steps")

    def _draw_trajectory(self) -> None:
        path, title = self.folder / "trajectory.png", "From latent to image"
        self.gallery.save_trajectory(self.trainer.average, path, title)

    def score(self) -> None:
        """Print the bounds on bits/dim of the test images that were looked at during training."""
        scored, num_samples = (
            (self.trainer.average, self.test_pixels, self.test_labels),
            self.settings.importance_samples,
        )
        bounds = evaluation.dequantized_bits_per_dim(*scored, num_samples=num_samples, generator=self._generator())
        one_sample, weighted = map(evaluation.Estimate.of, bounds)
        print(
            f"score   {one_sample} bits/dim of {len(self.test_pixels):,} test images by one sample, "
            f"{weighted} by {num_samples} importance-weighted ones; {self.test_source}",
            flush=True,
        )

    def calibrate(self) -> None:
        """Time the decoders, once each and in the precision in which they draw pictures, into ``calibration.json``."""
        model, guidance = self.trainer.average, self.config.sample_guidance
        largest = hardware.chunk_size(model.config.decoding_bytes(branches=2), model.device)
        batches = {min(size, largest) for size in CALIBRATED_BATCHES}
        flow = cast(TokenFlow, model.flow)
        seconds = max(CALIBRATION_SECONDS, CALIBRATION_SHARE * self.log.elapsed)
        level = model.noise_levels and model.noise_levels[1]  # that at which samples are drawn
        timings = calibration.calibrate(flow, guidance, batches=batches, rounds=1, seconds=seconds, noise_level=level)
        calibration.save(self.folder, timings)
        first = max(timing.block for timing in timings)  # others may be without guidance
        sizes = sorted({timing.rows // count_branches(guidance) for timing in timings if timing.block == first})
        tqdm.write(f"timed   the decoders on batches of {', '.join(map(str, sizes))} images")

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.trainer.device).manual_seed(self.settings.seed)

    def save(self) -> None:
        """Write a checkpoint and the averaged weights, and delete the oldest checkpoint.

        None is deleted while steps are not finite, so that those from before remain.
        """
        trainer = self.trainer
        with processes.together():
            checkpoints.save(self.checkpoints, trainer.step, trainer.state_dict() | {"measures": self.log.state_dict()})
        self._by_main(self._save_weights)

    def _save_weights(self) -> None:
        self.trainer.average.save_weights(self.folder / "model.safetensors")
        if not self.trainer.bad_in_a_row:
            checkpoints.rotate(self.checkpoints, self.settings.keep_checkpoints)

    def write_settings(self) -> None:
        """Write ``config.json``."""
        write_config(
            self.folder,
            **self.trainer.model.config_dict(),
            sigma=self.settings.noise_sigma,
            denoising_steps=self.settings.denoising_steps,
            guidance=self.config.sample_guidance and asdict(self.config.sample_guidance),
            class_names=self.gallery.class_names,
            **(self.trainer.dataset.encoders or {}),
            train=self.config.config_dict(),
            data=self.data,
        )


def summarize(config: TrainConfig, dataset: ImageDataset | ImageFolder, device: torch.device) -> str:
    """The data, the model, the memory and the device of a training that is about to begin, a line each.

    Raises:
        ValueError: it would take more memory than the device has.
    """
    with torch.device("meta"):
        model = build(config, dataset)
    settings, parameters = config.training, sum(parameter.numel() for parameter in model.parameters())
    bfloat16, num_ranks = uses_bfloat16(settings.precision, device), processes.num_ranks()
    shards = {"none": 1, "full": num_ranks, "hybrid": processes.num_local_ranks()}[settings.sharding]
    needed = throughput.memory(model.config, settings, parameters, num_ranks, shards, 2 if bfloat16 else 4)
    total = sum(needed.values())
    hardware.check_memory(total, device, f"training at batch size {settings.batch_size}")
    present = hardware.total_bytes(device)
    parts = ", ".join(f"{name} {part / 2**30:.2g}" for name, part in needed.items())
    sigma = " to ".join(map(str, model.noise_levels or [settings.sigma]))
    noise = f"Gaussian noise of sigma {sigma}" if settings.noise == "gaussian" else f"{settings.noise} noise"
    return (
        f"data    {dataset.source}; {noise}\n"
        f"model   {model.config.summary}, {parameters / 1e6:.1f}M parameters\n"
        f"memory  about {total / 2**30:.2g} of {present / 2**30:.1f} GiB for each process: {parts}\n"
        f"device  {_describe(device, settings)}, {model.network_name} in {'bfloat16' if bfloat16 else 'float32'}"
    )


def _describe(device: torch.device, settings: TrainingConfig) -> str:
    """The devices, in words: ``cpu``, or ``8 x cuda, weights sharded (full)``."""
    if processes.num_ranks() == 1:
        return str(device)
    weights = "a copy of the weights on each" if settings.sharding == "none" else f"{settings.sharding} sharding"
    return f"{processes.num_ranks()} x {device.type}, {weights}"
