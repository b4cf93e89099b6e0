"""Published code, from checkouts of public repositories, with the weights of a model of ours.

Only contenders that are such code need a checkout, and ``tools/record_published.py``. Another repository takes a line
in :data:`CODES`, and a way to build its model in :func:`published`.
"""

import argparse
import ast
import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tarflow import Guidance, TarFlow
from tarflow.published import to_published
from tarflow.transforms import SoftplusTransform

_GUIDED = {"alpha": "a", "mu": "b"}


@dataclass(frozen=True)
class Code:
    """A repository, the file of its model, and the option that tells where a checkout is.

    The environment tells it to this process and to those that it starts.
    """

    name: str
    repository: str
    file: str = "transformer_flow.py"

    @property
    def option(self) -> str:
        """The flag of commands."""
        return f"--{self.name}"

    @property
    def help(self) -> str:
        """What the flag is for."""
        return f"folder of a checkout of {self.repository}, to measure against"

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"TARFLOW_{self.name.upper().replace('-', '_')}"

    @property
    def folder(self) -> Path:
        """Where the checkout is; NotImplementedError where nobody said so."""
        if self.variable not in os.environ:
            raise NotImplementedError(f"no checkout given; see {self.option}")
        return Path(os.environ[self.variable])

    def use(self, folder: Path | None) -> None:
        """Measure against the checkout in this folder, if there is one."""
        if folder is not None:
            os.environ[self.variable] = str(folder.resolve())

    def load(self) -> ModuleType:
        """Import the module of the model."""
        return _load(self.folder / self.file)


TARFLOW = Code("published", "apple/ml-tarflow")
ITARFLOW = Code("itarflow", "apple/ml-itarflow")
GS_JACOBI = Code("gs-jacobi", "encoreus/GS-Jacobi_for_TarFlow", "GS_Jacobi_sampling.py")
STARFLOW = Code("starflow", "apple/ml-starflow")
CODES = TARFLOW, ITARFLOW, GS_JACOBI, STARFLOW


def use(arguments: argparse.Namespace) -> None:
    """Measure against the checkouts that a command was told of."""
    for code in CODES:
        code.use(getattr(arguments, code.name.replace("-", "_")))


@functools.cache
def _load(path: Path) -> ModuleType:
    if str(path.parent) not in sys.path:  # STARFlow's imports a package beside it
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Models ---------------------------------------------------------------------------------------------------------------


def published(model: TarFlow) -> nn.Module:
    """Build the model of TarFlow's code with the weights of ours, or of iTarFlow's or STARFlow's, if ours is one.

    Raises:
        NotImplementedError: nobody said where the checkout is.
    """
    config = model.config
    if config.start_token:
        return _published_starflow(model)
    common = {"nvp": not config.volume_preserving, "num_blocks": config.num_blocks, "num_classes": config.num_classes}
    if config.noise_levels is None:
        sizes = {name: getattr(config, name) for name in ("patch_size", "channels", "layers_per_block")}
        return with_weights(TARFLOW, model, **common, **sizes)
    channels, layers = list(config.channels_of_blocks), list(config.layers_of_blocks)
    patch_sizes = [config.patch_size]
    return with_weights(ITARFLOW, model, **common, patch_sizes=patch_sizes, channels=channels, layers_per_block=layers)


def _published_starflow(model: TarFlow) -> nn.Module:
    config = model.config
    return with_weights(
        STARFLOW,
        model,
        patch_size=config.patch_size,
        channels=config.channels,
        num_blocks=config.num_blocks,
        layers_per_block=list(config.layers_of_blocks),
        rope=True,
        sos=True,
        use_softplus=True,
        use_final_norm=config.final_norm,
        soft_clip=SoftplusTransform.bound,
        seq_order="L2R",
        txt_size=config.prefix_length,
        txt_dim=config.prefix_dim,
        cond_top_only=config.prefix_dim > 0,
    )


def with_weights(code: Code, model: TarFlow, **options: Any) -> nn.Module:
    """Build a published ``Model`` with the weights of ours, on the same device.

    Its weights require gradients: autocast keeps what it cast only of such weights.
    """
    with model.flow.prior_variance.device:
        theirs = code.load().Model(model.config.in_channels, model.config.image_size, **options)
    theirs.load_state_dict(theirs.state_dict() | to_published(model.state_dict()))
    return theirs.requires_grad_()


# Runs -----------------------------------------------------------------------------------------------------------------


def sample(
    theirs: nn.Module,
    z: Tensor,
    labels: Tensor | None,
    guidance: Guidance | None,
    noise_level: float | None = None,
    **options: Any,
) -> Any:
    """Turn latents into images with a published model, whose reference branch never has a label.

    More options are those of its ``reverse``.
    """
    if guidance:
        options |= {
            "guidance": guidance.weight,
            "attn_temp": guidance.temperature,
            "annealed_guidance": guidance.schedule == "linear",
        }
        if guidance.parameters != "both":
            options["guide_what"] = _GUIDED[guidance.parameters]
    if noise_level is not None:
        options["t"] = z.new_full((len(z), 1), noise_level)
    if guidance and noise_level is not None:
        style = "starflow" if guidance.rule == "gaussian" else "tarflow"
        options |= {"guide_flows": guidance.blocks or -1, "lerp_style": style}
    with torch.no_grad():
        return theirs.reverse(z, labels, **options)


def sample_starflow(
    theirs: nn.Module, latents: Tensor, texts: Tensor | None, guidance: Guidance | None, empty: Tensor
) -> Tensor:
    """Turn latents, of the shape of images, into images with STARFlow's code, guided away from an empty text."""
    if guidance is not None and texts is not None:
        texts = torch.cat((texts, empty.expand_as(texts)))
    # Its default cache is one object for all calls.
    caches = [STARFLOW.load().KVCache() for _ in theirs.blocks]
    weight = guidance.weight if guidance else 0
    with torch.no_grad():
        return theirs(latents.clone(), texts, reverse=True, kv_caches=caches, guidance=weight)


def remove_noise(
    theirs: nn.Module, x: Tensor, labels: Tensor | None, levels: list[float], clip: bool = False
) -> Tensor:
    """Denoise images along equally spaced levels, and 0, with iTarFlow's code: a part of a program for GPUs.

    Its weights must not require gradients: those of the program do not.
    """
    first, last = levels[0], levels[-2]
    sizes = {"sample_batch_size": len(x), "denoising_batch_size": len(x), "img_size": x.shape[2]}
    arguments = SimpleNamespace(**sizes, channel_size=x.shape[1], clip=clip, dyn="ode")
    alone = SimpleNamespace(world_size=1)
    with patch.object(Tensor, "cuda", lambda self: self.to(x.device)):
        return _denoising_of(ITARFLOW.folder)(
            theirs, labels, x, arguments, alone, t0=last, t1=first, steps=len(levels) - 1
        )


@functools.cache
def _denoising_of(folder: Path) -> Any:
    """Take two functions out of a program that cannot be imported without what it evaluates with."""
    wanted = "self_denoising", "iterative_denoising"
    program = ast.parse((folder / "evaluate_fid.py").read_text())
    functions = [node for node in program.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    names = {"torch": torch}
    exec(compile(ast.Module(functions, []), "evaluate_fid.py", "exec"), names)
    return names["iterative_denoising"]


def gradients(theirs: nn.Module, model: TarFlow) -> list[Tensor]:
    """Collect the gradients of a published model in the order and the shapes of our parameters."""
    weights, collected = dict(theirs.named_parameters()), []
    for name, parameter in model.named_parameters():
        (published_name,) = to_published({name: parameter})
        # Positions that are reversed once more are in our order again.
        (gradient,) = to_published({name: weights[published_name].grad}).values()
        collected.append(gradient.reshape_as(parameter))
    return collected
