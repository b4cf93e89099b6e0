"""The log of a run: its metrics in ``metrics.jsonl``, with TensorBoard as events too, and a progress bar."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import hardware, processes
from ..files import atomic_write, name_full_disk
from ..image_flow import FlowConfig
from . import throughput
from .config import TrainingConfig
from .interruptions import raise_thread_errors_once
from .timetable import TimeLeft, work_left
from .trainer import MEASURES

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Log"]

PROFILED = 5
"""Steps after which one is profiled: by then all is compiled and allocated."""


class Log:
    """The metrics of a run, of which :meth:`add` averages those of several steps into a row.

    Of several processes, all of which have the same measures, the main one writes them.

    Args:
        folder: that of the run.
        config: the settings of the training.
        device: the one that trains.
        model: the configuration of the model.

    Attributes:
        pending: the measures of each step that no row holds yet.
        waited: the seconds for which training has waited for images since the last row.
    """

    def __init__(self, folder: Path, config: TrainingConfig, device: torch.device, model: FlowConfig):
        self.folder, self.config, self.device, self.model = folder, config, device, model
        self.path = folder / "metrics.jsonl"
        self.pending: list[dict[str, Tensor]] = []
        self.waited = 0.0
        self._measured: dict[str, float] = {}

    def forget_after(self, step: int) -> None:
        """Drop the rows that a run which goes on from a step would not have logged by now, had it not been interrupted.

        Among them are the evaluation at this very step, which is repeated, and a row that was written only because the
        step was the last one, if it is that no more: :attr:`pending` holds its measures.
        """
        if not self.path.exists():
            return
        complete = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [row for row in complete if self._is_kept(row, step)]
        with atomic_write(self.path) as beside:
            beside.write_text("".join(kept))

    def _is_kept(self, row: str, step: int) -> bool:
        entries: Any = row
        try:
            entries = json.loads(row)
            return entries["step"] < step or (entries["step"] == step and "loss" in entries and self._writes(step))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: expected rows with a step; got {entries!r:.60}") from error

    def _writes(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step >= self.config.max_steps

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Keep the events and the progress bar open, from a step on."""
        self._began = time.perf_counter()
        self._since, self._since_step, self._profiled_step = self._began, step, step + PROFILED
        self._time_left, self._rows = TimeLeft(), 0
        if not processes.is_main():
            yield
            return
        with (
            name_full_disk(self.folder),
            raise_thread_errors_once(),
            _open_events(self.folder, step) as self._writer,
            tqdm(
                total=self.config.max_steps,
                initial=step,
                unit="step",
                dynamic_ncols=True,
                mininterval=1 if sys.stderr.isatty() else 30,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            ) as self._bar,
        ):
            yield

    @property
    def elapsed(self) -> float:
        """The seconds since the log was opened."""
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Within the block no time passes for the speed of training; it is that of other work, by its name."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._since += seconds
        self._time_left.note(work, seconds)

    @contextlib.contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Within the block, a step after so many others, find out how much of its time is communication.

        That is done once, in the main of several processes, since it takes time itself. A device that waits for
        another one is communicating.
        """
        if step != self._profiled_step or processes.num_ranks() == 1 or not processes.is_main():
            yield
            return
        before = time.perf_counter()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints when it starts
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU if self.device.type == "cpu" else kinds.CUDA]) as profile:
            began = time.perf_counter()
            yield
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds = time.perf_counter() - began
        self._since += time.perf_counter() - before - seconds
        share = throughput.share_of_time(profile, throughput.COLLECTIVE, seconds)
        self._measured["share_of_time_in_communication"] = share

    def add(self, step: int, measures: dict[str, Tensor], learning_rate: float) -> int:
        """Collect the measures of a step on the device, and look at them only when a row is due.

        Returns:
            how many steps in a row were not finite, up to this one; 0 where no row was due.
        """
        self.pending.append(measures)
        if not self._writes(step):
            return 0
        # One transfer for all of them.
        values = torch.stack([torch.stack(list(row.values())).float() for row in self.pending]).cpu()
        row = dict(zip(measures, values.mean(0).tolist(), strict=True))
        last = dict(zip(measures, values[-1].int().tolist(), strict=True))
        row["bad_steps"], row["bad_in_a_row"] = last["bad_steps"], last["bad_in_a_row"]
        now = time.perf_counter()
        steps, seconds = step - self._since_step, now - self._since
        row["images_per_second"] = steps * self.config.batch_size / seconds
        row["images_per_second_per_device"] = row["images_per_second"] / processes.num_ranks()
        row |= self._utilization(row["images_per_second_per_device"])
        row["share_of_time_waiting_for_data"] = self.waited / seconds
        row |= self._measured
        self._measured = {}
        if self.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        row["learning_rate"] = learning_rate
        self._since, self._since_step, self.waited = now, step, 0.0
        self._note_steps(steps, seconds)
        if step % self.config.log_every == 0:  # else a run that is made longer goes on with them
            self.pending = []
        if processes.is_main():
            self.write(step, row)
            self._show(step, row)
        return last["bad_in_a_row"]

    def _utilization(self, images_per_second: float) -> dict[str, float]:
        """The operations of training over those that the device could do, where both are known."""
        operations, peak = throughput.training_operations(self.model), hardware.peak_operations(self.device)
        if operations is None or peak is None or not hardware.uses_bfloat16(self.config.precision, self.device):
            return {}
        return {"model_flop_utilization": images_per_second * operations / peak}

    def _show(self, step: int, row: dict[str, float]) -> None:
        """Move the progress bar."""
        self._bar.set_postfix_str(
            f"loss {row['loss']:.4f}, {row['bits_per_dim']:.3f} bits/dim, {row['images_per_second']:.0f} images/s, "
            f"{tqdm.format_interval(self.seconds_left(step))} left",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def _note_steps(self, steps: int, seconds: float) -> None:
        """Take account of the time of steps; that of the first row, in which all is set up, counts until the second."""
        self._rows += 1
        if self._rows == 2:
            del self._time_left.taken["step"]
        self._time_left.note("step", seconds, steps)

    def seconds_left(self, step: int) -> float:
        """Estimate the seconds that the run takes from a step on, with evaluation, samples and checkpoints."""
        return self._time_left.estimate(work_left(step, self.config))

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append a row, and write its values as events."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name, value, step)

    def write_picture(self, step: int, name: str, path: Path) -> None:
        """Write a picture as an event."""
        if self._writer is None:
            return
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def state_dict(self) -> dict[str, Tensor]:
        """The pending measures, of all steps together by their names."""
        return {name: torch.stack([row[name] for row in self.pending]) for name in MEASURES if self.pending}

    def load_state_dict(self, measures: dict[str, Tensor]) -> None:
        """Take the pending measures of a checkpoint; ValueError where they are none."""
        if measures == {}:
            self.pending = []
            return
        sound = isinstance(measures, dict) and set(measures) == set(MEASURES)
        if not sound or any(not isinstance(part, Tensor) or part.dim() != 1 for part in measures.values()):
            raise ValueError(f"state.measures: expected a tensor (n,) for each of {', '.join(MEASURES)}")
        steps = zip(*(measures[name].to(self.device) for name in MEASURES), strict=True)
        self.pending = [dict(zip(MEASURES, step, strict=True)) for step in steps]


@contextlib.contextmanager
def _open_events(folder: Path, step: int) -> Iterator["SummaryWriter | None"]:
    """Open the events of TensorBoard, from behind a step on; None where it, the extra ``train``, is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with SummaryWriter(str(folder), purge_step=step + 1) as writer:
        yield writer
