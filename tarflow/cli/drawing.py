"""Flags that say how samples are drawn: those of ``tarflow sample``, and of ``tarflow evaluate --samples``."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from tqdm import tqdm

from ..decoding import BlockStatistics, Decoder, DecoderName
from ..denoising import Denoising
from ..guidance import Guidance
from ..image_flow import ImageFlow, at_least_one
from ..validation import check_sigma
from .shared import check_guidance_weight, check_tolerance

__all__ = ["Drawing", "Progress"]

GUIDANCE_FLAGS = ("schedule", "temperature", "guide", "drop_label", "rule", "guided_blocks")
LEVEL_FLAGS = ("stochastic", "clip")
DENOISING_FLAGS = ("denoising_steps", *LEVEL_FLAGS)


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn."""

    guidance: float = 0.0
    """weight of guidance; 0 for none"""
    schedule: Literal["linear", "constant"] = "linear"
    """course of the weight over the tokens"""
    temperature: float = 1.0
    """temperature of the attention in the reference branch of guidance"""
    guide: Literal["both", "alpha", "mu"] = "both"
    """the parameters that are guided"""
    drop_label: bool = True
    """whether the reference branch drops the label"""
    rule: Literal["extrapolate", "gaussian"] = "extrapolate"
    """how guidance combines its branches: away from the reference, or the quotient of two Gaussians"""
    guided_blocks: int | None = None
    """how many of the blocks that are generated first are guided; by default all"""
    sigma: float | None = None
    """standard deviation of the noise to remove; by default that of training, 0 leaves it"""
    denoising_steps: int | None = None
    """steps that remove the noise, by Tweedie's formula each; by default as many as in training, where samples are of
    one, or of 10 with noise levels"""
    stochastic: bool = False
    """whether these steps replace a part of the noise by other noise"""
    clip: bool = False
    """whether these steps clip their estimates of the clean image to [-1, 1]"""
    decoder: DecoderName = "auto"
    """auto is the faster of the two for each block, as timed at the end of training or by `tarflow calibrate`"""
    window: int | None = None
    """tokens of an image that the jacobi decoder updates at once; by default all of them"""
    tolerance: float | None = None
    """how much each latent of the jacobi decoder may differ from the one that was drawn; by default 0.01"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """number format of the transformers"""

    def check(self, given: Collection[str]) -> None:
        """Raise ValueError for what no model can be asked for; ``given`` are the fields whose flags were."""
        if self.sigma is not None:
            check_sigma("sigma", self.sigma)
        check_guidance_weight(self.guidance)
        for name in ("guided_blocks", "denoising_steps"):
            if (value := getattr(self, name)) is not None:
                at_least_one(name, value)
        self.make_denoising()
        for name in DENOISING_FLAGS:
            if name in given and self.sigma == 0:
                raise ValueError(
                    f"{name}: expected none with --sigma 0, which leaves the noise; got {getattr(self, name)}"
                )
        for name in GUIDANCE_FLAGS:
            if name in given and "guidance" not in given:
                value = getattr(self, name)
                raise ValueError(f"{name}: expected none without --guidance, a part of which it is; got {value}")
        if "tolerance" in given and self.decoder == "sequential":
            raise ValueError(f"tolerance: expected none for the sequential decoder; got {self.tolerance}")

    def check_usable(self, given: Collection[str], model: ImageFlow) -> None:
        """Raise ValueError for a flag that the model has no use for."""
        useless: tuple[str, ...] = (
            () if model.supports_guidance else ("sigma", "denoising_steps", "guidance", *GUIDANCE_FLAGS)
        )
        useless += ("decoder", "window", "tolerance") if model.decoders == ("auto",) else ()
        useless += () if model.noise_levels else LEVEL_FLAGS
        for name in useless:
            if name in given:
                kind, value = type(model).__name__, getattr(self, name)
                raise ValueError(f"{name}: expected none for a {kind}, which has no use for it; got {value!r}")

    def make_decoder(self) -> Decoder:
        """The decoder; ValueError for settings that it does not take."""
        decoder = Decoder(self.decoder, self.window)
        return decoder if self.tolerance is None else check_tolerance(replace(decoder, tolerance=self.tolerance))

    def make_guidance(self) -> Guidance | None:
        """The guidance, or None for none; ValueError for settings that it does not take."""
        branches = self.guidance, self.schedule, self.temperature, self.guide, self.drop_label
        guidance = Guidance(*branches, self.rule, self.guided_blocks)
        return guidance if guidance.weight else None

    def make_denoising(self, metadata: Mapping[str, Any] = MappingProxyType({})) -> Denoising:
        """The way in which noise is removed from the samples of a model with these metadata; ValueError if in none."""
        steps = metadata.get("denoising_steps") if self.denoising_steps is None else self.denoising_steps
        return Denoising(steps, self.stochastic, self.clip)

    def denoise_sigma(self, metadata: dict[str, Any]) -> float:
        """The standard deviation of the noise to remove from the samples of a model with these metadata."""
        return metadata.get("sigma", 0.0) if self.sigma is None else self.sigma


class Progress:
    """A bar of images that moves with every block, and what decoding them took."""

    def __init__(self, num: int, num_blocks: int, shown: bool = True):
        self.num, self.num_blocks, self.shown = num, num_blocks, shown
        self.blocks: list[BlockStatistics] = []

    def __enter__(self) -> "Progress":
        layout = "{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        self.bar = tqdm(total=self.num, unit=" images", dynamic_ncols=True, bar_format=layout, disable=not self.shown)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def note(self, statistics: BlockStatistics) -> None:
        """Move the bar, since a block is done."""
        self.blocks.append(statistics)
        self.bar.set_postfix_str(f"block {statistics.block + 1}: {statistics.decoder}, {statistics.passes} passes")
        self.bar.update(statistics.batch / self.num_blocks)

    def summary(self) -> str:
        """Such as ``80 images in 3.1 s, 26 images/s; 73 passes for 780 sequential steps (1/10.7): jacobi``."""
        seconds = self.bar.format_dict["elapsed"]
        if not self.blocks:  # a model that reports no passes
            return f"{self.num} images in {seconds:.3g} s, {self.num / seconds:.3g} images/s"
        images = sum(block.batch for block in self.blocks) / self.num_blocks
        passes = sum(block.passes for block in self.blocks)
        steps = sum(block.steps for block in self.blocks)
        decoders = {block.block: str(block.decoder) for block in self.blocks}
        how = ", ".join(f"{decoder} (block {t + 1})" for t, decoder in decoders.items())
        if len(set(decoders.values())) == 1:
            (how,) = set(decoders.values())
        return (
            f"{images:.0f} images in {seconds:.3g} s, {images / seconds:.3g} images/s; "
            f"{passes} passes for {steps} sequential steps (1/{steps / max(passes, 1):.3g}): {how}"
        )
