"""Maximum likelihood by AdamW, or by Muon and AdamW: everything that one step does, its learning rate included.

The random numbers of a step are a function of (seed, step), as are the order of the data and the learning rate. So a
checkpoint holds weights, their average and the moments of the optimizers, and a resumed run repeats an uninterrupted
one.

Of several processes each draws the random numbers of the whole batch and takes those of its own images, so that a run
is the same for any number of them, up to the order of sums and to dropout, which each process draws by itself.
"""

import copy
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..datasets import ImageDataset, ImageFolder, evenly_spaced
from ..hardware import uses_bfloat16
from ..image_flow import ImageFlow
from ..model import TarFlow
from ..noise import add_gaussian_noise, add_uniform_noise, bits_per_dim, derive_seed, levels_per_unit
from . import parallel
from .config import TrainConfig, TrainingConfig
from .muon import LayerMuon

__all__ = ["MEASURES", "Objective", "Trainer", "build", "learning_rate"]

INITIAL_IMAGES = 128
"""Training images that set the scales of layers which take them from data."""

PRIOR_IMAGES = 1024
"""Training images whose latents give the prior of a volume-preserving flow its variance."""

MEASURES = ("loss", "bits_per_dim", "grad_norm", "bad_steps", "bad_in_a_row")
"""Names of the numbers that a step returns."""


Prepared = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Images, labels, normal numbers of learned noise, and noise levels: what the objective takes."""


class Objective(nn.Module):
    """The loss of a model, its latents, and its log-densities ``(B,)``.

    The loss is the negative log-likelihood in nats per dimension, up to a constant: ``mean(z^2) / 2 - logdet / (N D)``.
    Learned noise adds its log-density, ``log q / (N D)``. A volume-preserving flow is trained under the unit prior too;
    the variance of its latents is only measured. Of a model with noise levels the loss of each image is weighted by its
    level t, of which the log-densities of small ones would take all the gradient (iTarFlow, arXiv 2604.20041).
    """

    def __init__(self, model: ImageFlow):
        super().__init__()
        self.model = model

    def forward(
        self, x: Tensor, labels: Tensor | None, eps: Tensor | None, noise_level: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score images with noise, or, where the noise is learned, pixels and the normal numbers to make it of."""
        log_q = 0.0
        if eps is not None:
            assert self.model.dequantizer is not None
            x, log_q = self.model.dequantizer(x, eps)
        z, logdet = self.model(x, labels, noise_level=noise_level)
        gain = logdet - log_q
        if noise_level is None:
            loss = 0.5 * z.square().mean() - gain.mean() / self.model.config.num_dims
        else:
            of_images = 0.5 * z.square().flatten(1).mean(1) - gain / self.model.config.num_dims
            loss = (noise_level * of_images).mean()
        return loss, z, self.model.log_prior(z) + gain


class Trainer:
    """The state of training and one method, :meth:`train_step`, that advances it.

    Attributes:
        config: the settings of the run.
        model: the model in training.
        muon: the optimizer of the transformers' layers, if it is not AdamW.
        optimizer: AdamW, of all other parameters.
        step: updates done, skipped ones included.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset | ImageFolder, device: torch.device):
        self.config = config
        self.device = device
        self.dataset = dataset
        torch.manual_seed(config.training.seed)
        self.model = build(config, dataset).to(device)
        self._initialize()
        parallel.broadcast_weights(self.model)
        self._average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self._looked_at: tuple[int, ImageFlow] | None = None
        self._run_loss = self._share_out()
        decay = config.training.weight_decay
        self.muon = LayerMuon(self.model, decay) if config.training.optimizer == "muon" else None
        moved = set(self.muon.weights) if self.muon else set()
        self._parameters = [parameter for parameter in self.model.parameters() if parameter not in moved]
        # Of a parameter that is sharded, AdamW moves the shard: it looks at each number by itself, so that is the same.
        self._weights = [
            nn.Parameter(shard, parameter.requires_grad)
            if (shard := parallel.local(parameter)) is not parameter
            else parameter
            for parameter in self._parameters
        ]
        # Only the fused implementation can skip an update on the device, without the host looking at the loss.
        self.optimizer = torch.optim.AdamW(
            self._weights,
            lr=0.0,
            betas=(0.9, config.training.beta2),
            weight_decay=decay,
            fused=True,
        )
        self.generator = torch.Generator(device)
        self.flip = dataset.flip if config.data.flip is None else config.data.flip
        self.step = 0
        self.bad_steps = torch.zeros((), device=device)
        self.bad_in_a_row = torch.zeros((), device=device)

    def _share_out(self) -> Callable[..., Any]:
        """Share model and average among the processes; returns the objective, ready to be called."""
        config = self.config.training
        mesh = parallel.make_mesh(config.sharding, self.device, self.model)
        objective = Objective(self.model)
        by_layers = config.compile and parallel.num_ranks() > 1
        parallel.rework_layers(objective, config.activation_checkpointing, by_layers)
        if mesh is not None:
            parallel.share(Objective(self._average), mesh)
        shared = parallel.share(objective, mesh, uses_bfloat16(config.precision, self.device))
        return torch.compile(shared, fullgraph=True) if config.compile and not by_layers else shared

    @property
    def average(self) -> ImageFlow:
        """The exponential moving average of the weights, which is evaluated, sampled and kept; in evaluation mode.

        The prior of a volume-preserving flow has the variance of its latents. Those of averaged weights differ from
        those of the weights in training, so that the variance is measured anew, once a step. Where weights are sharded,
        all processes gather them when they first look at a step, and let go of them at the next one.
        """
        if self._looked_at is None or self._looked_at[0] != self.step:
            average = parallel.gather_weights(self._average)
            if average.prior_adapts:
                self._fit_prior(average)
            self._looked_at = self.step, average
        return self._looked_at[1]

    def train_step(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Do one update from uint8 images and labels, this process's share of a batch; returns measures of the whole.

        They are on the device. A step whose loss or gradient is not finite in any process changes nothing and is
        counted.
        """
        config = self.config.training
        seed = derive_seed(config.seed, self.step)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed ^ parallel.rank())  # for dropout, which takes no generator
        prepared = self.prepare(pixels, labels, parallel.rank(), parallel.num_ranks())
        self.step += 1
        self._looked_at = None
        self._set_learning_rate(learning_rate(self.step, config))
        loss, bits, z = self._accumulate(prepared, levels_per_unit(pixels))
        gradient_norm = parallel.clip_gradients([*self.model.parameters()], config.gradient_clip)
        bad = ~(loss.isfinite() & gradient_norm.isfinite())
        adamw: Any = self.optimizer
        adamw.grad_scale, adamw.found_inf = None, bad.float()
        parallel.hand_over(self._parameters, self._weights)
        self.optimizer.step()
        if self.muon:
            self.muon.step_unless(bad)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        self.model.update_prior(z, 0.1 * ~bad)
        self._update_average()
        self.bad_steps += bad
        self.bad_in_a_row.add_(1).mul_(bad)
        return {
            "loss": loss,
            "bits_per_dim": bits,
            "grad_norm": gradient_norm,
            "bad_steps": self.bad_steps.clone(),
            "bad_in_a_row": self.bad_in_a_row.clone(),
        }

    def _accumulate(self, prepared: Prepared, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add up the gradient over the parts of a share; returns the loss and bits/dim of the batch, and its latents.

        Where there is more than one part, of one process or several, the latents are those of a single image, which
        have the second moments of all: a prior needs no more. The ``scale`` is that of
        :func:`~tarflow.noise.bits_per_dim`.
        """
        config, dims = self.config.training, self.model.config.num_dims
        low, sums, parts = uses_bfloat16(config.precision, self.device), [], config.accumulate
        for part in range(parts):
            of_part = [t if t is None else t[part::parts] for t in prepared]
            with parallel.synchronized(self._run_loss, part == parts - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                    loss, z, log_prob = self._run_loss(*of_part)
                ((loss * dims if config.loss_per == "image" else loss) / parts).backward()
            z = z.detach()
            moments = z.square().mean(0) if self.model.prior_adapts else z.new_zeros(())
            bits = bits_per_dim(log_prob.detach(), dims, scale).mean()
            sums.append((loss.detach(), bits, moments))
        if parts == parallel.num_ranks() == 1:
            return *sums[0][:2], z
        loss, bits, moments = (parallel.mean(torch.stack(terms).mean(0)) for terms in zip(*sums, strict=True))
        return loss, bits, moments.sqrt()[None]

    def prepare(self, pixels: Tensor, labels: Tensor, rank: int = 0, num_ranks: int = 1) -> Prepared:
        """Images with noise, labels with some dropped, None, and the noise level of each image, all on the device.

        Where the noise is learned, the model makes it: then these are the pixels, and in place of None the normal
        numbers that it makes the noise of. The level is drawn uniformly for a model with noise levels, and None for any
        other. The images may be the share of a process, those at every ``num_ranks``-th place of a batch from ``rank``
        on: they get the random numbers that they would get in the batch.
        """
        config = self.config.training
        pixels, labels = pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

        def draw(distribution: Callable[..., Tensor], *shape: int) -> Tensor:
            whole = (num_ranks * len(pixels), *shape)
            return distribution(whole, generator=self.generator, device=self.device)[rank::num_ranks]

        if self.flip:
            flipped = draw(torch.rand, 1, 1, 1) < 0.5
            pixels = torch.where(flipped, pixels.flip(-1), pixels)
        x, eps, level = pixels, None, None
        if levels := self.model.noise_levels:
            level = levels[0] + (levels[1] - levels[0]) * draw(torch.rand)
        if config.noise == "gaussian":
            sigma = config.sigma if level is None else level.view(-1, 1, 1, 1)
            x = add_gaussian_noise(pixels, sigma, eps=draw(torch.randn, *pixels.shape[1:]))
        elif config.noise == "uniform":
            x = add_uniform_noise(pixels, u=draw(torch.rand, *pixels.shape[1:]))
        else:
            eps = draw(torch.randn, *pixels.shape[1:])
        if not self.config.data.conditional:
            return x, None, eps, level
        return x, labels.masked_fill(draw(torch.rand) < config.label_drop, -1), eps, level

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the counts of steps that were not finite.

        What is sharded is in tensors that PyTorch has for that, DTensors.
        """
        _ = self.average  # for its prior
        optimizer = self.optimizer.state_dict()
        for i, moments in optimizer["state"].items():
            optimizer["state"][i] = {
                name: parallel.shard_like(part, self._parameters[i], whole=False) if part.dim() else part
                for name, part in moments.items()
            }
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": optimizer,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
        } | ({"muon": self.muon.state_dict()["state"]} if self.muon else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. The settings of the optimizer stay those of the configuration.

        Raises:
            ValueError: a part is missing, or is not a finite number or tensor of the shape and dtype that it has here,
                for example because the weights are those of another configuration. Then nothing has been loaded.
        """
        try:
            given, begun = state["optimizer"]["state"].keys(), state["step"] != 0
            rate = float(state["optimizer"]["param_groups"][0]["lr"])  # which all optimizers share
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError("state: expected a step, and an optimizer with its state, among other parts") from error
        # A parameter that has had no gradient yet has no moments.
        expected = self.expected_state([i for i in range(len(self._weights)) if i in given or (begun and not given)])
        _check_like(state, expected, "state")
        self.model.load_state_dict(state["model"])
        self._average.load_state_dict(state["average"])
        moments = {
            i: {name: parallel.local(part) for name, part in moments.items()}
            for i, moments in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        if self.muon:
            self.muon.load_state_dict(self.muon.state_dict() | {"state": state["muon"]})
        self._set_learning_rate(rate)
        self.step, self._looked_at = state["step"], None
        self.bad_steps.copy_(state["bad_steps"])
        self.bad_in_a_row.copy_(state["bad_in_a_row"])

    def expected_state(self, trained: Collection[int] | None = None) -> dict[str, Any]:
        """A state with the keys, shapes and dtypes of one to load, in which these parameters have moments, or all."""
        expected, count = self.state_dict(), torch.zeros(())
        expected["optimizer"]["state"] = {
            i: {"step": count, "exp_avg": parameter.data, "exp_avg_sq": parameter.data}
            for i, parameter in enumerate(self._parameters)
            if trained is None or i in trained
        }
        return expected

    def _set_learning_rate(self, rate: float) -> None:
        for optimizer in (self.optimizer, self.muon):
            if optimizer:
                optimizer.param_groups[0]["lr"] = rate

    def _initialize(self) -> None:
        """Set the scales of the layers that take them from data, if there are such layers."""
        if any(hasattr(module, "initialize") for module in self.model.modules() if module is not self.model):
            pixels, labels = self.dataset.get_batch(evenly_spaced(len(self.dataset), INITIAL_IMAGES))
            given = labels.to(self.device) if self.config.data.conditional else None
            self.model.initialize(pixels.to(self.device), given)

    @torch.no_grad()
    def _update_average(self) -> None:
        """``average <- d average + (1 - d) model``, where d grows to its final value over the first steps."""
        decay = min(self.config.training.ema_decay, (1 + self.step) / (10 + self.step))
        average, weights = ([*map(parallel.local, model.parameters())] for model in (self._average, self.model))
        torch._foreach_lerp_(average, weights, 1 - decay)

    @torch.no_grad()
    def _fit_prior(self, average: ImageFlow) -> None:
        """Give the prior of the average the variance of its latents of training images, with the noise of training.

        The images are spread over the dataset; their random numbers depend on (seed, step) alone. The pass is in
        float32, like evaluation, and every process does all of it, in pieces of the size that it trains on.
        """
        config = self.config.training
        self.generator.manual_seed(derive_seed(config.seed, self.step, 1))
        seen, size = 0, config.batch_size // (config.accumulate * parallel.num_ranks())
        for indices in evenly_spaced(len(self.dataset), PRIOR_IMAGES).split(config.batch_size):
            prepared = self.prepare(*self.dataset.get_batch(indices))
            for start in range(0, len(indices), size):
                x, labels, eps, level = (part if part is None else part[start : start + size] for part in prepared)
                if eps is not None:
                    assert average.dequantizer is not None
                    x, _ = average.dequantizer(x, eps)
                z, _ = average(x, labels, noise_level=level)
                seen += len(z)
                average.update_prior(z, len(z) / seen)  # the mean over all that was seen


def build(config: TrainConfig, dataset: ImageDataset | ImageFolder) -> ImageFlow:
    """The untrained model of a run on these data."""
    model = config.flow(config.model_config(dataset))
    if isinstance(model, TarFlow) and model.config.prefix_dim and dataset.prefixes is not None:
        model.set_prefixes(dataset.prefixes)
    return model


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of update number ``step``, counted from 1: a function of that number alone, without a state.

    It rises linearly from the least rate to the peak over the warm-up. Then the schedule ``"cosine"`` is half a cosine
    down to the least rate at the last step, ``"constant"`` is the peak, and the others are those that Flow++ was
    published with, see :func:`flowpp_imagenet32` and :func:`flowpp_imagenet64`.

    >>> config = TrainingConfig(learning_rate=1.0, min_learning_rate=0.0, warmup_steps=2, max_steps=6)
    >>> [round(learning_rate(step, config), 2) for step in range(1, 7)]
    [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    peak, least, warmup_steps = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if step <= warmup_steps:
        return least + (peak - least) * step / warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "flowpp-imagenet32":
        return peak * flowpp_imagenet32(step)
    if config.schedule == "flowpp-imagenet64":
        return peak * flowpp_imagenet64(step)
    progress = min(1.0, (step - warmup_steps) / max(1, config.max_steps - warmup_steps))
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


def flowpp_imagenet32(step: int) -> float:
    """The published rate of Flow++ on ImageNet 32 x 32, relative to its peak of 1e-3 after a warm-up of 5,000 steps.

    It is 1 up to step 50,000, and then falls by a factor 0.99995 a step, down to 0.3. Source: aravindsrinivas/flowpp,
    ``imagenet32_official.py``.
    """
    return max(0.3, 0.99995 ** max(0, step - 50_000))


def flowpp_imagenet64(step: int) -> float:
    """The published rate of Flow++ on ImageNet 64 x 64, relative to its peak of 4e-4 after a warm-up of 10,000 steps.

    It is 1 up to step 50,000, then falls by a factor 0.99995 a step, and is 3/4 from step 55,000 on. "To prevent any
    NaNs" it warms up twice more, from 0 to 1/40 over the 10,000 steps from 230,000 on, and from 0 to 1/400 over those
    from 280,000 on. Source: aravindsrinivas/flowpp, ``imagenet64_official.py``, its docstring: its code returns no rate
    at the borders, and negative rates in the last warm-up.
    """
    if step < 55_000:
        return 0.99995 ** max(0, step - 50_000)
    if step < 230_000:
        return 3 / 4
    if step < 280_000:
        return min(1.0, (step - 230_000) / 10_000) / 40
    return min(1.0, (step - 280_000) / 10_000) / 400


def _check_like(got: Any, expected: Any, name: str) -> None:
    """Raise ValueError where a part of a state has not the keys, shapes and dtypes of another, or is not finite."""
    if isinstance(expected, dict) and isinstance(got, dict):
        if differing := got.keys() ^ expected.keys():
            key = min(differing, key=str)
            raise ValueError(f"{name}: expected {f'a part {key}' if key in expected else f'no part {key}'}")
        for key, part in expected.items():
            _check_like(got[key], part, f"{name}.{key}")
    elif isinstance(expected, Tensor) and isinstance(got, Tensor):
        kinds = [f"{tensor.layout} {tensor.dtype} {list(tensor.shape)}" for tensor in (expected, got)]
        if kinds[0] != kinds[1] or got.is_meta:
            raise ValueError(f"{name}: expected {kinds[0]}; got {kinds[1]}{' without data' if got.is_meta else ''}")
        numbers = parallel.local(got)
        if not numbers.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers; got nan or inf")
        if name.endswith(_NOT_NEGATIVE) and numbers.numel() and numbers.min() < 0:
            raise ValueError(f"{name}: expected no number below 0; got {numbers.min():g}")
    elif type(got) is not type(expected) or (isinstance(got, int) and got < 0):
        kind = "a whole number >= 0" if isinstance(expected, int) else f"a {type(expected).__name__}"
        raise ValueError(f"{name}: expected {kind}; got {got if isinstance(got, int) else f'a {type(got).__name__}'}")


# Counts, and the moments of squares.
_NOT_NEGATIVE = (".step", ".exp_avg_sq", ".bad_steps", ".bad_in_a_row")
