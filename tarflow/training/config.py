"""What a training run is told, and the published recipes by name."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from ..datasets import Folder, Images
from ..model import TarFlowConfig


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Image size, channels and classes come from the dataset."""

    dataset: str = "fashion-mnist"
    """fashion-mnist, mnist, cifar10, imagenet64, folder or hub:<name>"""
    data_dir: Path | None = None
    """where the files of the dataset are"""
    image_size: int | None = None
    """side to which a folder's images are resized and cropped"""
    conditional: bool = True
    """learn from the labels"""

    patch_size: int = 2
    channels: int = 128
    """width of the transformers"""
    num_blocks: int = 4
    layers_per_block: int = 2
    head_dim: int = 64
    expansion: int = 4
    volume_preserving: bool = False

    noise: Literal["gaussian", "uniform"] = "gaussian"
    """gaussian for samples, uniform for likelihoods"""
    sigma: float = 0.1
    """standard deviation of Gaussian noise, images being in [-1, 1]"""
    label_drop: float = 0.1
    """share of the labels that are dropped, which guidance needs"""

    max_steps: int = 2200
    batch_size: int = 16
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-6
    warmup_steps: int = 100
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
    guidance: float = 2.0
    """weight of the linear label guidance in the sample grids; 0 for none"""

    def __post_init__(self):
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0; got {getattr(self, name)}")
        for name in ("sigma", "label_drop", "ema_decay", "weight_decay", "guidance", "warmup_steps", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0; got {getattr(self, name)}")
        for name in ("label_drop", "ema_decay"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected a number below 1; got {getattr(self, name)}")

    @property
    def noise_sigma(self) -> float:
        """What denoising has to remove: 0 for uniform noise, which bits/dim account for instead."""
        return self.sigma if self.noise == "gaussian" else 0.0

    def model(self, dataset: Images | Folder) -> TarFlowConfig:
        """The shape of the model that fits the dataset."""
        architecture = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _SHAPE}
        return TarFlowConfig(
            **architecture
            | {
                "image_size": dataset.image_size,
                "in_channels": dataset.in_channels,
                "num_classes": dataset.num_classes if self.conditional else 0,
            }
        )


_SHAPE = {field.name for field in fields(TarFlowConfig)} - {"image_size"}
_POSITIVE = (
    "max_steps",
    "batch_size",
    "learning_rate",
    "gradient_clip",
    "max_bad_steps",
    "log_every",
    "evaluate_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
)

# What a run cannot change when it is resumed, because what it has learned depends on it.
FIXED_ON_RESUME = (
    "dataset",
    "image_size",
    "conditional",
    "patch_size",
    "channels",
    "num_blocks",
    "layers_per_block",
    "head_dim",
    "expansion",
    "volume_preserving",
    "noise",
    "sigma",
    "batch_size",
    "seed",
)


def _published(epochs: int, num_images: int, **settings) -> TrainConfig:
    """The recipe that the published models share: no clipping worth the name, one epoch of warm-up."""
    steps_per_epoch = num_images // settings["batch_size"]
    return replace(
        TrainConfig(
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


_IMAGENET, _AFHQ = 1_281_167, 14_630

PRESETS: dict[str, TrainConfig] = {
    "fashion-mnist": TrainConfig(),
    "imagenet64-likelihood": _published(
        100, _IMAGENET, dataset="imagenet64", conditional=False, patch_size=2, channels=768, noise="uniform",
        batch_size=256, label_drop=0.0, precision="float32", guidance=0.0,
    ),
    "imagenet64": _published(
        200, _IMAGENET, dataset="imagenet64", conditional=False, patch_size=2, channels=768, sigma=0.05,
        batch_size=256, label_drop=0.0, guidance=0.0,
    ),
    "imagenet64-cond": _published(
        200, _IMAGENET, dataset="imagenet64", patch_size=2, channels=768, sigma=0.05, batch_size=256,
    ),
    "imagenet128-cond": _published(
        320, _IMAGENET, dataset="folder", image_size=128, patch_size=4, channels=1024, sigma=0.15, batch_size=768,
    ),
    "afhq256-cond": _published(
        4000, _AFHQ, dataset="folder", image_size=256, patch_size=8, channels=768, sigma=0.07, batch_size=256,
    ),
}  # fmt: skip
