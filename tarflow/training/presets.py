"""The published recipes, and small ones that a CPU trains, by name."""

from dataclasses import replace
from typing import Any

from ..flowpp.config import FlowPPConfig
from ..guidance import Guidance
from ..model import STARFLOW, TarFlowConfig
from .config import DataConfig, TrainConfig, TrainingConfig

__all__ = ["PRESETS"]

_IMAGENET, _AFHQ = 1_281_167, 14_630
_RARELY: dict[str, Any] = {"log_every": 50, "evaluate_every": 5000, "sample_every": 5000, "checkpoint_every": 5000}


def _published(
    data: DataConfig, patch_size: int, channels: int, epochs: int, num_images: int, batch_size: int, **training: Any
) -> TrainConfig:
    """The recipe that the published TarFlows share, with one epoch of warm-up and folders resized as by torchvision."""
    steps_per_epoch = num_images // batch_size
    return TrainConfig(
        replace(data, resize="bilinear"),
        TarFlowConfig(data.image_size or 64, 3, patch_size, channels, num_blocks=8, layers_per_block=8),
        TrainingConfig(
            batch_size=batch_size,
            warmup_steps=steps_per_epoch,
            max_steps=epochs * steps_per_epoch,
            learning_rate=1e-4,
            ema_decay=0.9999,
            **_RARELY,
            **training,
        ),
    )


def _published_itarflow(
    image_size: int, patch_size: int, channels: int, largest: float, epochs: int, label_drop: float
) -> TrainConfig:
    """The recipe that the published iTarFlows share, on ImageNet: shallow blocks under a deep one, 512 images a batch.

    The pictures of a run are guided in the deep block alone, as published. Source: apple/ml-itarflow.
    """
    recipe = _published(
        DataConfig("folder", image_size=image_size), patch_size, channels, epochs, _IMAGENET, 512,
        sigma=largest, label_drop=label_drop, min_learning_rate=1e-5, guidance=Guidance(2.1, blocks=1),
    )  # fmt: skip
    levels = 0.01, largest
    model = TarFlowConfig(image_size, 3, patch_size, channels, 4, (4, 4, 4, 24), noise_levels=levels)
    return replace(recipe, model=model)


_FLOWPP = TrainingConfig(noise="variational", guidance=Guidance(0.0), label_drop=0.0)


def _published_flowpp(dataset: str, model: FlowPPConfig, **training: Any) -> TrainConfig:
    """The recipe that the published Flow++ share: Adam on nats per image, in float32, without augmentation.

    Gradients are clipped at norm 1. Batches are the published ones, there split among the 8 (ImageNet 64: 6) GPUs of a
    machine, here on one device. Source: aravindsrinivas/flowpp.
    """
    common = replace(
        _FLOWPP,
        beta2=0.999,
        weight_decay=0.0,
        loss_per="image",
        min_learning_rate=0.0,
        precision="float32",
        **_RARELY,
    )
    return TrainConfig(DataConfig(dataset, flip=False, conditional=False), model, replace(common, **training))


_STARFLOW_GUIDANCE = Guidance(2.5, "constant", rule="gaussian")  # the top block alone sees what it is guided by

PRESETS: dict[str, TrainConfig] = {
    "fashion-mnist": TrainConfig(
        DataConfig(),
        TarFlowConfig(patch_size=4, layers_per_block=2),
        TrainingConfig(
            max_steps=3000, batch_size=32, optimizer="muon", learning_rate=6e-3, warmup_steps=300,
            guidance=Guidance(3.0), denoising_steps=2,
        ),
    ),
    "itarflow-fashion-mnist": TrainConfig(
        model=TarFlowConfig(patch_size=2, layers_per_block=(1, 1, 1, 5), noise_levels=(0.01, 0.3)),
        training=TrainingConfig(guidance=Guidance(blocks=1)),
    ),
    "starflow-fashion-mnist": TrainConfig(
        DataConfig("latents"),
        TarFlowConfig(patch_size=1, num_blocks=3, layers_per_block=(1, 1, 4), **STARFLOW),
        TrainingConfig(
            max_steps=2000, batch_size=32, optimizer="muon", learning_rate=6e-3, warmup_steps=200, sigma=0.3,
            guidance=_STARFLOW_GUIDANCE,
        ),
    ),
    "starflow-256": TrainConfig(
        DataConfig("latents"),
        TarFlowConfig(32, 4, 1, 3072, 6, (2, 2, 2, 2, 2, 24), **STARFLOW),
        TrainingConfig(
            batch_size=1024, learning_rate=6.4e-5, min_learning_rate=1e-6, sigma=0.3, guidance=_STARFLOW_GUIDANCE
        ),
    ),
    "fashion-mnist-flowpp": TrainConfig(
        DataConfig(conditional=False), FlowPPConfig.fashion_mnist(), replace(_FLOWPP, learning_rate=2e-3)
    ),
    "cifar10-flowpp": _published_flowpp(
        "cifar10", FlowPPConfig.cifar10(), max_steps=400_000, batch_size=64, learning_rate=3e-4,
        schedule="constant", warmup_steps=2000,
    ),
    "imagenet32-flowpp": _published_flowpp(
        "imagenet32-2016", FlowPPConfig.imagenet32(), max_steps=640_000, batch_size=32, learning_rate=1e-3,
        schedule="flowpp-imagenet32", warmup_steps=5000, ema_decay=0.999222,
    ),
    "imagenet64-flowpp": _published_flowpp(
        "imagenet64-2016", FlowPPConfig.imagenet64(), max_steps=300_000, batch_size=72, learning_rate=4e-4,
        schedule="flowpp-imagenet64", warmup_steps=10_000,
    ),
    "imagenet64-likelihood": _published(
        DataConfig("imagenet64-2016", conditional=False), 2, 768, 100, _IMAGENET, 256,
        noise="uniform", label_drop=0.0, precision="float32",
    ),
    "imagenet64": _published(
        DataConfig("imagenet64-2016", conditional=False), 2, 768, 200, _IMAGENET, 256, sigma=0.05, label_drop=0.0
    ),
    "imagenet64-cond": _published(DataConfig("folder", image_size=64), 2, 768, 200, _IMAGENET, 256, sigma=0.05),
    "imagenet128-cond": _published(DataConfig("folder", image_size=128), 4, 1024, 320, _IMAGENET, 768, sigma=0.15),
    "afhq256-cond": _published(DataConfig("folder", image_size=256), 8, 768, 4000, _AFHQ, 256, sigma=0.07),
    "itarflow-imagenet64": _published_itarflow(64, 2, 1280, 0.3, 300, label_drop=0.1),
    "itarflow-imagenet128": _published_itarflow(128, 4, 1600, 0.5, 450, label_drop=0.1),
    "itarflow-imagenet256": _published_itarflow(256, 8, 2176, 0.7, 600, label_drop=0.0),
}  # fmt: skip
