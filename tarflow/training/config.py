"""What a training run is told, and the published recipes by name."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ..datasets import RESIZE, Folder, Images
from ..flowpp.dequantizer import DequantizerConfig
from ..flowpp.model import FlowPPConfig
from ..guidance import Guidance
from ..model import TarFlowConfig
from ..validation import check_sigma
from .schedule import Schedule


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Image size, channels and classes come from the dataset.

    ValueError, which names it, for a setting that is out of its range or does not go with the others.
    """

    dataset: str = "fashion-mnist"
    """fashion-mnist, mnist, cifar10, imagenet32 or imagenet64 (of 2017; with -2016, of 2016), folder or hub:<name>"""
    data_dir: Path | None = None
    """where the files of the dataset are"""
    image_size: int | None = None
    """side to which a folder's images are resized and cropped"""
    resize: Literal[tuple(RESIZE)] = "lanczos"
    """the filter that resizes them"""
    flip: bool | None = None
    """whether half of the images are mirrored in training; None where a mirrored image of the dataset means the same"""
    conditional: bool = True
    """learn from the labels; Flow++ has none"""

    model: Literal["tarflow", "flowpp"] = "tarflow"
    coupling: Literal["affine", "mixture"] = "affine"
    """how a value is mapped: affinely, or by a mixture of logistics too"""
    num_mixtures: int = 8
    """logistics in a mixture"""

    patch_size: int = 2
    channels: int = 128
    """width of the transformers"""
    num_blocks: int = 4
    layers_per_block: int = 2
    head_dim: int = 64
    expansion: int = 4
    volume_preserving: bool = False

    stack: str = FlowPPConfig.stack
    """levels of a Flow++: squeezes, and couplings of columns (stripe) or channels"""
    filters: int = FlowPPConfig.filters
    """channels of the conditioners of a Flow++"""
    blocks_per_coupling: int = FlowPPConfig.blocks_per_coupling
    """gated blocks of a conditioner"""
    attention: Literal["softmax", "max", "none"] = FlowPPConfig.attention
    """of pixels to each other; max is its ablation with the same parameters"""
    pointwise: bool = FlowPPConfig.pointwise
    elu_output: bool = FlowPPConfig.elu_output
    weight_norm: bool = FlowPPConfig.weight_norm
    dropout: float = FlowPPConfig.dropout

    noise: Literal["gaussian", "uniform", "variational"] = "gaussian"
    """gaussian for samples; uniform or variational, which is learned, for likelihoods"""
    dequantizer: DequantizerConfig = field(default_factory=DequantizerConfig)
    """of variational noise"""
    sigma: float = 0.1
    """standard deviation of Gaussian noise, images being in [-1, 1]"""
    label_drop: float = 0.1
    """share of the labels that are dropped, which guidance needs"""

    max_steps: int = 2200
    batch_size: int = 16
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-6
    warmup_steps: int = 100
    schedule: Schedule = "cosine"
    """of the learning rate after the warm-up"""
    loss_per: Literal["dimension", "image"] = "dimension"
    """what the nats of the loss are counted by, to which the clipping and the epsilon of Adam are relative"""
    beta2: float = 0.95
    """of Adam"""
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    """largest norm of the gradient"""
    ema_decay: float = 0.999
    """of the average of the weights that is evaluated, sampled and kept"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the transformers; auto is bfloat16 where the device gains from it"""
    compile: bool = False
    """train through torch.compile"""
    max_bad_steps: int = 20
    """non-finite steps in a row, each skipped, after which training gives up"""

    seed: int = 0
    device: str = "auto"
    log_every: int = 10
    evaluate_every: int = 500
    sample_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    score_draws: int = 8
    """importance-weighted draws of the bits/dim that a run ends with, where noise is within bins; 0 for no score"""
    guidance: Guidance = field(default_factory=Guidance)
    """of the sample grids; weight 0 for none, and without labels the default is none"""

    def __post_init__(self):
        if isinstance(self.guidance, int | float):  # its weight, as flags and runs had it before there was more
            object.__setattr__(self, "guidance", Guidance(self.guidance))
        kinds = get_type_hints(type(self))
        for name, value in vars(self).items():
            choices = get_args(kinds[name]) if get_origin(kinds[name]) is Literal else (value,)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
        for name, least in _LEAST.items():
            value, most = getattr(self, name), MOST_DRAWS if name == "score_draws" else 2**63 - 1
            if not isinstance(value, int) or not least <= value <= most:
                range_of = f"{least} to {'2^63 - 1' if most == 2**63 - 1 else most}"
                raise ValueError(f"{name}: expected an integer from {range_of}; got {value}")
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
        for name in ("label_drop", "ema_decay", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 0 and below 1; got {getattr(self, name)}")
        check_sigma("sigma", self.sigma)
        if self.model == "flowpp" and self.conditional:
            raise ValueError("conditional: expected False for flowpp, which has no labels; got True")
        if self.model == "flowpp" and self.noise == "gaussian":
            raise ValueError("noise: expected uniform or variational for flowpp, which ends at 0 and 255; got gaussian")
        if self.sample_guidance is not None:
            if self.model == "flowpp":
                raise ValueError(f"guidance: expected weight 0 for flowpp, which is never guided; got {self.guidance}")
            self.guidance.check(int(self.conditional), mixture=self.coupling == "mixture")

    @classmethod
    def read(cls, settings: dict[str, Any]) -> "TrainConfig":
        """From JSON, as a run keeps it; settings that it does not know of yet have their defaults.

        Guidance was once the weight of label guidance alone, which counted for nothing without labels.
        """
        data_dir = settings["data_dir"]
        given = {"dequantizer": {}, "guidance": {}} | settings
        given["data_dir"] = None if data_dir is None else Path(data_dir)
        given["dequantizer"] = DequantizerConfig(**given["dequantizer"])
        if isinstance(given["guidance"], dict):
            given["guidance"] = Guidance(**given["guidance"])
        elif not given["conditional"]:
            given["guidance"] = 0.0
        return cls(**given)

    @property
    def sample_guidance(self) -> Guidance | None:
        """What guides the sample grids, if anything: without labels the default, which drops them, does not."""
        if not self.guidance.weight or (not self.conditional and self.guidance == Guidance()):
            return None
        return self.guidance

    @property
    def noise_sigma(self) -> float:
        """What denoising has to remove: 0 for uniform noise, which bits/dim account for instead."""
        return self.sigma if self.noise == "gaussian" else 0.0

    def shape(self, dataset: Images | Folder) -> TarFlowConfig | FlowPPConfig:
        """The shape of the model that fits the dataset; ValueError for a conditional one where there are no labels."""
        if self.conditional and not dataset.num_classes:
            raise ValueError("conditional: expected False (--no-conditional) for data without labels; got True")
        kind = TarFlowConfig if self.model == "tarflow" else FlowPPConfig
        told = {field.name: getattr(self, field.name) for field in fields(kind) if hasattr(self, field.name)}
        told |= {
            "image_size": dataset.image_size,
            "in_channels": dataset.in_channels,
            "dequantizer": self.dequantizer if self.noise == "variational" else None,
        }
        if kind is TarFlowConfig:
            told["num_classes"] = dataset.num_classes if self.conditional else 0
        return kind(**told)

    def unused(self) -> dict[str, str]:
        """The settings that say nothing here, and the flag that would give each a meaning."""
        unused = {}
        if not self.conditional:
            unused["label_drop"] = "--conditional"
        if self.coupling == "affine":
            unused["num_mixtures"] = "--coupling mixture"
        if self.noise != "gaussian":
            unused["sigma"] = "--noise gaussian"
        if self.noise != "variational":
            unused["dequantizer"] = "--noise variational"
        if self.model == "tarflow":
            return unused | dict.fromkeys(_OF_FLOWPP, "--model flowpp")
        return unused | dict.fromkeys(_OF_TARFLOW, "--model tarflow")


_OF_TARFLOW = (
    "patch_size",
    "channels",
    "num_blocks",
    "layers_per_block",
    "head_dim",
    "expansion",
    "volume_preserving",
    "sigma",
    "label_drop",
    "guidance",
)
_OF_FLOWPP = (
    "stack",
    "filters",
    "blocks_per_coupling",
    "attention",
    "pointwise",
    "elu_output",
    "weight_norm",
    "dropout",
)

_LEAST = {
    **dict.fromkeys(("max_steps", "batch_size", "max_bad_steps", "keep_checkpoints"), 1),
    **dict.fromkeys(("log_every", "evaluate_every", "sample_every", "checkpoint_every"), 1),
    **dict.fromkeys(("warmup_steps", "seed", "score_draws"), 0),
}
MOST_DRAWS = 100_000
_LARGEST = torch.finfo(torch.float32).max

# What a run cannot change when it is resumed, because what it has learned depends on it.
FIXED_ON_RESUME = (
    "dataset",
    "image_size",
    "resize",
    "flip",
    "conditional",
    "patch_size",
    "channels",
    "num_blocks",
    "layers_per_block",
    "head_dim",
    "expansion",
    "volume_preserving",
    "model",
    "coupling",
    "num_mixtures",
    "stack",
    "filters",
    "blocks_per_coupling",
    "attention",
    "pointwise",
    "elu_output",
    "weight_norm",
    "dropout",
    "noise",
    "dequantizer",
    "sigma",
    "loss_per",
    "batch_size",
    "seed",
)


def _published(epochs: int, num_images: int, **settings) -> TrainConfig:
    """The recipe that the published models share: one epoch of warm-up, and folders resized as torchvision does it."""
    steps_per_epoch = num_images // settings["batch_size"]
    return replace(
        TrainConfig(
            resize="bilinear",
            num_blocks=8,
            layers_per_block=8,
            learning_rate=1e-4,
            ema_decay=0.9999,
            log_every=50,
            evaluate_every=5000,
            sample_every=5000,
            checkpoint_every=5000,
            warmup_steps=steps_per_epoch,
            max_steps=epochs * steps_per_epoch,
        ),
        **settings,
    )


def _flowpp(shape: FlowPPConfig, **settings) -> TrainConfig:
    """Training of a Flow++ of that shape."""
    told = {name: value for name, value in vars(shape).items() if name not in ("image_size", "in_channels")}
    return TrainConfig(
        model="flowpp",
        conditional=False,
        noise="variational",
        guidance=Guidance(0.0),
        label_drop=0.0,
        **told | settings,
    )


def _published_flowpp(shape: FlowPPConfig, **settings) -> TrainConfig:
    """What the published Flow++ share: Adam on nats per image, clipped at norm 1, in float32, without augmentation.

    Batches are the published ones, there split among the 8 (ImageNet 64: 6) GPUs of a machine, here on one device.
    Source: aravindsrinivas/flowpp.
    """
    common = {
        "beta2": 0.999,
        "weight_decay": 0.0,
        "loss_per": "image",
        "min_learning_rate": 0.0,
        "flip": False,
        "precision": "float32",
        "log_every": 50,
        "evaluate_every": 5000,
        "sample_every": 5000,
        "checkpoint_every": 5000,
    }
    return _flowpp(shape, **common | settings)


_IMAGENET, _AFHQ = 1_281_167, 14_630

PRESETS: dict[str, TrainConfig] = {
    "fashion-mnist": TrainConfig(),
    "fashion-mnist-flowpp": _flowpp(FlowPPConfig.fashion_mnist(), learning_rate=2e-3),
    "cifar10-flowpp": _published_flowpp(
        FlowPPConfig.cifar10(), dataset="cifar10", max_steps=400_000, batch_size=64, learning_rate=3e-4,
        schedule="constant", warmup_steps=2000,
    ),
    "imagenet32-flowpp": _published_flowpp(
        FlowPPConfig.imagenet32(), dataset="imagenet32-2016", max_steps=640_000, batch_size=32, learning_rate=1e-3,
        schedule="flowpp-imagenet32", warmup_steps=5000, ema_decay=0.999222,
    ),
    "imagenet64-flowpp": _published_flowpp(
        FlowPPConfig.imagenet64(), dataset="imagenet64-2016", max_steps=300_000, batch_size=72, learning_rate=4e-4,
        schedule="flowpp-imagenet64", warmup_steps=10_000,
    ),
    "imagenet64-likelihood": _published(
        100, _IMAGENET, dataset="imagenet64-2016", conditional=False, patch_size=2, channels=768, noise="uniform",
        batch_size=256, label_drop=0.0, precision="float32",
    ),
    "imagenet64": _published(
        200, _IMAGENET, dataset="imagenet64-2016", conditional=False, patch_size=2, channels=768, sigma=0.05,
        batch_size=256, label_drop=0.0,
    ),
    "imagenet64-cond": _published(
        200, _IMAGENET, dataset="folder", image_size=64, patch_size=2, channels=768, sigma=0.05, batch_size=256,
    ),
    "imagenet128-cond": _published(
        320, _IMAGENET, dataset="folder", image_size=128, patch_size=4, channels=1024, sigma=0.15, batch_size=768,
    ),
    "afhq256-cond": _published(
        4000, _AFHQ, dataset="folder", image_size=256, patch_size=8, channels=768, sigma=0.07, batch_size=256,
    ),
}  # fmt: skip
