"""Settings of a training run: the data, the model, the training, and the three together."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ..compatibility import current_settings
from ..datasets import ImageDataset, ImageFolder, Resize
from ..denoising import MAX_STEPS, Denoising
from ..flowpp.config import DequantizerConfig, FlowPPConfig
from ..flowpp.model import FlowPP
from ..guidance import Guidance
from ..image_flow import ImageFlow
from ..model import TarFlow, TarFlowConfig
from ..pretrained import config_from_dict
from ..validation import check_sigma

__all__ = ["MAX_IMPORTANCE_SAMPLES", "MODELS", "DataConfig", "Schedule", "TrainConfig", "TrainingConfig"]

MODELS: dict[str, type[ImageFlow]] = {"tarflow": TarFlow, "flowpp": FlowPP}
"""The models that can be trained, by the names that the command line has for them."""

Schedule = Literal["cosine", "constant", "flowpp-imagenet32", "flowpp-imagenet64"]

MAX_IMPORTANCE_SAMPLES = 100_000
_LARGEST = torch.finfo(torch.float32).max


def setting(default: Any, *, fixed: bool = False, only: type | None = None, least: int | None = None) -> Any:
    """Declare a field of settings.

    Args:
        default: its default.
        fixed: whether it stays when a run is resumed, because what the run has learned depends on it.
        only: the configuration of the one model that has a use for it.
        least: the smallest of the integers that it may be.
    """
    return field(default=default, metadata={"fixed": fixed, "only": only, "least": least})


def _check_declared(settings: Any) -> None:
    """Raise ValueError for a value that is not of its annotation, or below the ``least`` declared."""
    kinds = get_type_hints(type(settings))
    for declared in fields(settings):
        value, kind, least = getattr(settings, declared.name), kinds[declared.name], declared.metadata.get("least")
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{declared.name}: expected one of {', '.join(get_args(kind))}; got {value!r}")
        kind = float | int if kind is float else kind
        if get_origin(kind) is not Literal and least is None and not isinstance(value, kind):
            raise ValueError(f"{declared.name}: expected {getattr(kind, '__name__', kind)}; got {value!r}")
        if least is not None and (type(value) is not int or not least <= value < 2**63):
            raise ValueError(f"{declared.name}: expected an integer from {least} to 2^63 - 1; got {value}")


@dataclass(frozen=True)
class DataConfig:
    """The images that a run trains on; size, channels and classes come from them.

    Raises:
        ValueError: a setting is not among its choices.
    """

    dataset: str = setting("fashion-mnist", fixed=True)
    """fashion-mnist, mnist, cifar10, imagenet32 or imagenet64 (of 2017; with -2016, of 2016), folder, latents or
    hub:<name>"""
    data_dir: Path | None = None
    """folder with the files of the dataset"""
    image_size: int | None = setting(None, fixed=True)
    """side to which a folder's images are resized and cropped"""
    resize: Resize = setting("lanczos", fixed=True)  # noqa: RUF009 (a Literal, which is immutable)
    """the filter that resizes them"""
    flip: bool | None = setting(None, fixed=True)
    """whether half of the images are mirrored in training; None where a mirrored image of the dataset means the same"""
    conditional: bool = setting(True, fixed=True, only=TarFlowConfig)
    """learn from the labels"""

    def __post_init__(self):
        if isinstance(self.data_dir, str):  # as JSON has it
            object.__setattr__(self, "data_dir", Path(self.data_dir))
        _check_declared(self)


@dataclass(frozen=True)
class TrainingConfig:
    """Noise, optimization, records and samples of a run.

    Raises:
        ValueError: a setting is out of its range or not among its choices; the message names it.
    """

    noise: Literal["gaussian", "uniform", "variational"] = setting("gaussian", fixed=True)
    """gaussian for samples; uniform or variational, which is learned, for likelihoods"""
    sigma: float = setting(0.1, fixed=True, only=TarFlowConfig)
    """standard deviation of Gaussian noise, images being in [-1, 1]; of a model with noise levels the largest"""
    label_drop: float = setting(0.1, only=TarFlowConfig)
    """share of the labels that are dropped, which guidance needs"""

    max_steps: int = setting(2200, least=1)
    """number of updates"""
    batch_size: int = setting(16, least=1, fixed=True)
    """images in an update, of all devices together"""
    accumulate: int = setting(1, least=1)
    """parts of an update, one after the other, that each device takes for its images to fit in memory"""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """of weights and averages over all devices, or over those of each machine; none is a copy of all on each"""
    activation_checkpointing: bool = False
    """compute the activations of a layer again in the backward pass, which takes less memory and more time"""
    optimizer: Literal["adamw", "muon"] = setting("adamw", fixed=True, only=TarFlowConfig)
    """adamw; or muon for the matrices of the transformers' layers, beside AdamW for the rest, under the same rates"""
    learning_rate: float = 1e-3
    """peak of the learning rate"""
    min_learning_rate: float = 1e-6
    """learning rate at the beginning of the warm-up and at the end of a cosine"""
    warmup_steps: int = setting(100, least=0)
    """updates over which the learning rate rises to its peak"""
    schedule: Schedule = "cosine"
    """course of the learning rate after the warm-up"""
    loss_per: Literal["dimension", "image"] = setting("dimension", fixed=True)
    """unit of the loss, to which the clipping and the epsilon of Adam are relative"""
    beta2: float = 0.95
    """decay of the squared gradients of Adam"""
    weight_decay: float = 1e-4
    """decoupled weight decay"""
    gradient_clip: float = 1.0
    """largest norm of the gradient"""
    ema_decay: float = 0.999
    """decay of the average of the weights, which is evaluated, sampled and kept"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """number format of the transformers; auto is bfloat16 where the device gains from it"""
    compile: bool = False
    """train through torch.compile, of several devices layer by layer"""
    max_bad_steps: int = setting(20, least=1)
    """non-finite steps in a row, each skipped, after which training gives up"""

    seed: int = setting(0, least=0, fixed=True)
    """seed of all randomness"""
    device: str = "auto"
    """auto, or a device of PyTorch such as cpu or cuda:1"""
    log_every: int = setting(10, least=1)
    """steps that a row of metrics.jsonl averages"""
    evaluate_every: int = setting(500, least=1)
    """steps between evaluations; there is an early one after a quarter of the first so many"""
    sample_every: int = setting(500, least=1)
    """steps between pictures of samples; there is an early one after a quarter of the first so many"""
    checkpoint_every: int = setting(500, least=1)
    """steps between checkpoints"""
    keep_checkpoints: int = setting(3, least=1)
    """number of the latest checkpoints that are kept"""
    importance_samples: int = setting(8, least=0)
    """importance-weighted samples of the bits/dim that a run ends with, where noise is within bins; 0 for no score"""
    calibrate: bool = setting(True, only=TarFlowConfig)
    """time the decoders for some seconds at the end, so that samples are drawn by the fastest"""
    guidance: Guidance = setting(Guidance(), only=TarFlowConfig)  # noqa: RUF009 (it is frozen)
    """guidance of the sample grids; weight 0 for none, and without labels there is none by labels"""
    denoising_steps: int | None = setting(None, only=TarFlowConfig)
    """steps that remove the noise of training from samples; by default 1, or 10 of a model with noise levels"""

    def __post_init__(self):
        if isinstance(self.guidance, dict):  # as JSON has it
            object.__setattr__(self, "guidance", Guidance(**self.guidance))
        _check_declared(self)
        if self.importance_samples > MAX_IMPORTANCE_SAMPLES:
            raise ValueError(
                f"importance_samples: expected an integer from 0 to {MAX_IMPORTANCE_SAMPLES}; "
                f"got {self.importance_samples}"
            )
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name}: expected a number > 0, at most {_LARGEST:.2g}; got {getattr(self, name)}")
        if not 0 <= self.weight_decay <= _LARGEST:
            raise ValueError(f"weight_decay: expected a number >= 0, at most {_LARGEST:.2g}; got {self.weight_decay}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate: expected a number from 0 to the learning rate, {self.learning_rate}; "
                f"got {self.min_learning_rate}"
            )
        for name in ("label_drop", "ema_decay", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 0 and below 1; got {getattr(self, name)}")
        if self.denoising_steps is not None and not 1 <= self.denoising_steps <= MAX_STEPS:
            raise ValueError(f"denoising_steps: expected 1 to {MAX_STEPS}; got {self.denoising_steps}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of the batch size {self.batch_size}; got {self.accumulate}"
            )
        if self.optimizer == "muon" and self.sharding != "none":
            raise ValueError(f"sharding: expected none with muon, which needs whole matrices; got {self.sharding}")
        check_sigma("sigma", self.sigma)
        if self.noise == "gaussian" and not self.sigma:
            raise ValueError(
                "sigma: expected more than 0 with Gaussian noise, without which densities have no bound; got 0"
            )

    @property
    def denoising(self) -> Denoising | None:
        """The way in which noise is removed from the samples of a run; None for that of the model."""
        return None if self.denoising_steps is None else Denoising(self.denoising_steps)

    @property
    def noise_sigma(self) -> float:
        """The standard deviation that denoising has to remove: 0 for noise within bins, which bits/dim account for."""
        return self.sigma if self.noise == "gaussian" else 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run is told.

    The model is one of images of any size: :meth:`model_config` fits it to the data, and has its dequantizer, or the
    default one, exactly where the noise is variational. If it has noise levels, sigma is the largest of them.

    Raises:
        ValueError: settings that do not go together; the message names one.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: TarFlowConfig | FlowPPConfig = TarFlowConfig(patch_size=2, layers_per_block=2)  # noqa: RUF009 (it is frozen)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        guidance = self.training.guidance
        if isinstance(self.model, FlowPPConfig):
            if self.data.conditional:
                raise ValueError("conditional: expected False for flowpp, which has no labels; got True")
            if self.training.noise == "gaussian":
                raise ValueError(
                    "noise: expected uniform or variational for flowpp, which ends at 0 and 255; got gaussian"
                )
            if self.training.optimizer == "muon":
                raise ValueError("optimizer: expected adamw for flowpp, which has no transformers; got muon")
            if self.sample_guidance is not None:
                raise ValueError(f"guidance: expected weight 0 for flowpp, which is never guided; got {guidance}")
            return
        if levels := self.model.noise_levels:
            if self.training.noise != "gaussian":
                raise ValueError(f"noise: expected gaussian for a model with noise levels; got {self.training.noise}")
            object.__setattr__(self, "training", replace(self.training, sigma=levels[1]))
        if self.sample_guidance is not None:
            guidance.check(int(self.data.conditional), mixture=self.model.coupling == "mixture")

    @classmethod
    def read(cls, config: dict[str, Any]) -> "TrainConfig":
        """The settings in the ``config.json`` of a run; those that it does not tell have their defaults.

        Raises:
            ValueError, TypeError, KeyError: settings that a run does not have, or that are not what they should be.
        """
        train = current_settings(config["train"])
        data, training = DataConfig(**train["data"]), TrainingConfig(**train["training"])
        flow = {flow.__name__: flow for flow in MODELS.values()}[config.get("flow", "TarFlow")]
        return cls(data, config_from_dict(flow.config_class, config["model"]), training)

    def config_dict(self) -> dict[str, Any]:
        """The ``train`` of ``config.json``, which has the model elsewhere."""
        return {"data": asdict(self.data), "training": asdict(self.training)}

    @property
    def flow(self) -> type[ImageFlow]:
        """The class of the model."""
        return next(flow for flow in MODELS.values() if flow.config_class is type(self.model))

    @property
    def sample_guidance(self) -> Guidance | None:
        """The guidance of the sample grids, if any: without labels that by labels alone is none."""
        guidance = self.training.guidance
        if not guidance.weight or (not self.data.conditional and guidance.temperature == 1):
            return None
        return guidance

    def model_config(self, dataset: ImageDataset | ImageFolder) -> TarFlowConfig | FlowPPConfig:
        """The model that fits the dataset; ValueError for a conditional one where there are no labels."""
        if dataset.encoders is not None and self.training.noise != "gaussian":
            raise ValueError(f"noise: expected gaussian for latents, which fill no bins; got {self.training.noise}")
        if self.data.conditional and not dataset.num_classes:
            raise ValueError("conditional: expected False (--no-conditional) for data without labels; got True")
        learned = self.training.noise == "variational"
        dequantizer = (self.model.dequantizer or DequantizerConfig()) if learned else None
        classes = dataset.num_classes if self.data.conditional else 0
        model = replace(self.model, dequantizer=dequantizer)
        if classes and dataset.prefixes is not None and isinstance(model, TarFlowConfig):
            length, size = dataset.prefixes.shape[1:]
            model = replace(model, prefix_length=length, prefix_dim=size)
        return model.for_data(dataset.image_size, dataset.in_channels, classes)

    def fixed_settings(self) -> Iterator[tuple[str, Any]]:
        """The settings of data and training that stay when a run is resumed; the model stays as a whole."""
        for part in (self.data, self.training):
            for declared in fields(part):
                if declared.metadata.get("fixed"):
                    yield declared.name, getattr(part, declared.name)
