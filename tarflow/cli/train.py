"""``tarflow train``: train a model, or go on with a run."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import processes
from ..decoding import calibration
from ..flowpp.config import FlowPPConfig
from ..image_flow import ImageFlow
from ..model import TarFlow, TarFlowConfig
from ..training import checkpoints
from ..training.config import MODELS, DataConfig, TrainConfig, TrainingConfig
from ..training.folder import new_folder, read_run
from ..training.presets import PRESETS
from ..training.run import train
from .parsing import Flat, flags_of, parse
from .shared import check_new_folder, check_writable

__all__ = ["Train", "read_flags", "run"]

if TYPE_CHECKING:
    ModelName = str
    PresetName = str
else:
    ModelName = Literal[tuple(MODELS)]
    PresetName = Literal[tuple(PRESETS)]


@dataclass(frozen=True)
class Train:
    """Train a TarFlow or, with `--model flowpp`, a Flow++. Without more flags: Fashion-MNIST in minutes on a CPU."""

    data: Flat[DataConfig]
    architecture: Flat[TarFlowConfig | FlowPPConfig]
    training: Flat[TrainingConfig]
    model: ModelName = "tarflow"
    """the model, whose flags are the ones listed here"""
    preset: PresetName = "fashion-mnist"
    """the recipe whose settings the other flags change; by default the first one of the model"""
    out: Path | None = None
    """folder of the run; by default a new one under runs/"""
    resume: Path | None = None
    """folder of a run to go on with, under its own settings where no flag changes them"""

    @property
    def config(self) -> TrainConfig:
        """The settings of the run."""
        return TrainConfig(self.data, self.architecture, self.training)


def run(arguments: Sequence[str]) -> None:
    """Train; the preset, or the run to resume, gives the defaults of all other flags."""
    command, given = read_flags(arguments)
    config = command.config
    if command.resume:
        _check_resumed(command, command.resume, given)
    _check_useful(config, given)
    if processes.is_restartable() and not (command.out or command.resume):
        raise ValueError("out: expected a folder with --max-restarts, for the run to be found again; got none")
    if command.out:
        check_new_folder("out", command.out)
    with processes.connected(config.training.device):
        out = command.resume or command.out or processes.of_main(lambda: new_folder(Path("runs"), command.preset))
        try:
            model = train(config, out, resume=command.resume is not None or processes.is_restartable())
        except KeyboardInterrupt as stop:
            if processes.num_ranks() == 1 or not str(stop):
                raise
            # The status of a failure would have torchrun start all processes again.
            if processes.is_main():
                print(f"tarflow train: {stop}", file=sys.stderr)
            return
        if processes.is_main():
            print(f"done    {out}; look at samples.png, trajectory.png and curves.png in it")
            print(f"next    {_next_commands(config, model, out)}")


def read_flags(arguments: Sequence[str]) -> tuple[Train, dict[str, str]]:
    """The settings that the flags of ``tarflow train`` tell, and the flags that were given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--preset", "--resume"):
        first.add_argument(name, nargs="?")  # a wrong value, or none, is left to the parser of all flags
    known, _ = first.parse_known_args(arguments)
    if known.resume:
        preset, config = "fashion-mnist", read_run(Path(known.resume))
    else:
        preset = known.preset if known.preset in PRESETS else _first_preset(MODELS.get(known.model, TarFlow))
        config = PRESETS[preset]
    chosen = next(name for name, flow in MODELS.items() if flow is config.flow)
    if known.model in MODELS and known.model != chosen:
        source = f"--resume {known.resume}" if known.resume else f"--preset {preset}"
        raise ValueError(f"model: expected {chosen}, the model of {source}; got {known.model}")
    every_flag = {
        flag: f"--model {name}"
        for name, flow in MODELS.items()
        for flag in flags_of(Train, _default(PRESETS[_first_preset(flow)]), _hides(flow))
    }
    return parse(
        Train,
        arguments,
        default=_default(config, model=chosen, preset=preset),
        hides=_hides(config.flow),
        build=_build,
        elsewhere=every_flag,
    )


def _default(config: TrainConfig, **told: Any) -> Train:
    return Train(config.data, config.model, config.training, **told)


def _first_preset(flow: type[ImageFlow]) -> str:
    return next(name for name, config in PRESETS.items() if config.flow is flow)


def _hides(flow: type[ImageFlow]) -> Callable[[type, Field], bool]:
    """Make a test whether a field of settings has no flag: the data tell it, or the model has no use for it."""
    from_data = signature(flow.config_class.for_data).parameters

    def hides(kind: type, field: Field) -> bool:
        if kind is flow.config_class:
            return field.name in from_data
        return field.metadata.get("only") not in (None, flow.config_class)

    return hides


def _build(default: Any, **told: Any) -> Any:
    """Settings like the default ones, but for those told; a model fits some image until the data give theirs."""
    try:
        return replace(default, **told)
    except ValueError:
        if not hasattr(default, "for_data"):
            raise
        for image_size in range(2, 513, 2):
            with contextlib.suppress(ValueError):
                return replace(default, **told, image_size=image_size)
        raise


def _check_useful(config: TrainConfig, given: dict[str, str]) -> None:
    """Raise ValueError for a flag that says nothing beside the others."""
    training = config.training
    has_levels = isinstance(config.model, TarFlowConfig) and config.model.noise_levels is not None
    useless = {
        "--resize": (not config.data.dataset.startswith(("folder", "hub:")), "--dataset folder"),
        "--label-drop": (not config.data.conditional, "--conditional"),
        "--num-mixtures": (config.model.coupling == "affine", "--coupling mixture"),
        "--sigma": (
            training.noise != "gaussian" or has_levels,
            "--noise-levels None" if has_levels else "--noise gaussian",
        ),
        "--dequantizer": (training.noise != "variational", "--noise variational"),
    }
    for flag, argument in given.items():
        is_useless, needed = useless.get(flag.partition(".")[0], (False, ""))
        if is_useless:
            name = flag.partition(".")[0].removeprefix("--").replace("-", "_")
            raise ValueError(f"{name}: expected with {needed} alone, which has a use for it; got {argument}")
    if any(flag.startswith("--guidance.") for flag in given):  # the default, too, if it was asked for
        training.guidance.check(int(config.data.conditional))


def _check_resumed(command: Train, run: Path, given: dict[str, str]) -> None:
    """Raise ValueError for flags that a run which goes on has no use for."""
    max_steps = command.training.max_steps
    if command.out:
        raise ValueError(f"out: expected no folder besides that of --resume, {run}; got {command.out}")
    if "--preset" in given:
        raise ValueError(f"preset: expected none besides --resume, since {run} has its settings; got {command.preset}")
    check_writable("resume", run)
    step = max(map(checkpoints.step_of, checkpoints.checkpoints(run / "checkpoints")), default=0)
    if max_steps < step:
        raise ValueError(f"max_steps: expected at least {step}, which {run} is at; got {max_steps}")


def _next_commands(config: TrainConfig, model: ImageFlow, out: Path) -> str:
    """The commands to go on with, for the last line of a run."""
    guidance = config.sample_guidance
    guided = f" --guidance {guidance.weight:g}" if guidance and model.config.num_classes else ""
    sample = f"tarflow sample {out}{guided} --out samples.png"
    if model.decoders == ("auto",):
        return f"{sample}; tarflow evaluate {out} --importance-samples 16"
    calibrate = "" if (out / calibration.FILE).exists() else f" tarflow calibrate {out};"
    return f"{sample};{calibrate} tarflow evaluate {out}"
