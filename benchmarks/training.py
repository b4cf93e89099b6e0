"""Rows of whole steps of training: loss, gradients and the update."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import checkout
import eager
from models import autocast, build, fashion_mnist, imagenet64
from row import BACKENDS, Contender, Outputs, Row, Run
from tarflow import TarFlow, TarFlowConfig
from tarflow.hardware import uses_bfloat16
from tarflow.model import patchify
from tarflow.training.throughput import operations
from tarflow.transformer import Condition
from tarflow_kernels import use_backend


def training_rows(device: torch.device) -> list[Row]:
    """The rows of a device."""
    if device.type == "cuda":
        batch = 32 if torch.cuda.get_device_properties(device).total_memory > 100e9 else 16
        settings = batch, torch.bfloat16, "float32"
        # The logits under a dense mask of 64 layers may not fit; those of a block do.
        return [
            training_row("ImageNet64 2-768-8-8", imagenet64(), *settings, dense=False),
            training_row("ImageNet64 2-768-1-8", imagenet64(1), *settings, note="one of the model's eight blocks"),
        ]
    precisions = [torch.float32, *[torch.bfloat16] * uses_bfloat16("auto", device)]
    return [
        training_row(f"28x28 patch {patch_size}", fashion_mnist(patch_size), batch, dtype, "float64", compiles=False)
        for patch_size, batch in ((4, 64), (2, 16))
        for dtype in precisions
    ]


@dataclass(frozen=True)
class TrainingInputs:
    """A model, its optimizer and a batch, as images and as tokens; the dense mask that hides later tokens."""

    model: TarFlow
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    mask: Tensor
    dtype: torch.dtype

    @property
    def tokens(self) -> Tensor:
        """The patches of the images."""
        return patchify(self.images, self.model.config.patch_size)


def _ours(block: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return block(tokens, Condition(labels))


def _loss(model: TarFlow, tokens: Tensor, labels: Tensor, forward: Callable) -> Tensor:
    """Negative log-likelihood in nats per dimension, up to a constant, through ``forward`` of each block."""
    logdet, values = 0, tokens[0].numel()
    for block in model.flow.blocks:
        tokens, block_logdet = forward(block, tokens, labels)
        logdet = logdet + block_logdet
    return 0.5 * tokens.square().mean() - logdet.mean() / values


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose learning rate is 0, so that all steps of all contenders start from the same weights."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-4, fused=True)


def _step(
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    gradients: Callable[[], list[Tensor]],
    inputs: TrainingInputs,
) -> Run:
    def run() -> Outputs:
        optimizer.zero_grad(set_to_none=True)
        with autocast(inputs.images.device, inputs.dtype):
            value = loss()
        value.backward()
        optimizer.step()
        return value.detach(), gradients()

    return run


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def _blockwise(inputs: TrainingInputs, forward: Callable = _ours) -> Run:
    loss = partial(_loss, inputs.model, inputs.tokens, inputs.labels, forward)
    return _step(loss, inputs.optimizer, partial(_gradients, inputs.model), inputs)


def _dense_mask(inputs: TrainingInputs, forward: Callable = eager.forward) -> Run:
    return _blockwise(inputs, partial(forward, mask=inputs.mask))


def _published(inputs: TrainingInputs) -> Run:
    model = checkout.published(inputs.model)

    def loss() -> Tensor:
        latents, _, logdets = model(inputs.images, inputs.labels)
        return model.get_loss(latents, logdets)

    return _step(loss, _optimizer(model), partial(checkout.gradients, model, inputs.model), inputs)


def _exact_step(inputs: TrainingInputs, dtype: torch.dtype) -> Outputs:
    """Loss and gradients from a copy of the model, summed over parts of the batch of about a thousand tokens."""
    model, tokens = copy.deepcopy(inputs.model).to(dtype), inputs.tokens.to(dtype)
    size = max(1, 1024 // tokens.shape[1])
    total = 0.0
    for part, labels in zip(tokens.split(size), inputs.labels.split(size), strict=True):
        loss = len(part) / len(tokens) * _loss(model, part, labels, partial(eager.forward, mask=inputs.mask))
        loss.backward()
        total = total + loss.detach()
    return total, _gradients(model)


def training_row(
    name: str,
    config: TarFlowConfig,
    batch: int,
    dtype: torch.dtype,
    exact: str,
    dense: bool = True,
    compiles: bool = True,
    note: str = "",
) -> Row:
    """Make a row; ``dense`` is whether to measure attention through a dense mask, eager and published, too.

    Contenders are also compiled, unless ``compiles`` is false.
    """

    def draw(device: torch.device) -> TrainingInputs:
        model = build(config, device)
        images = torch.rand(batch, config.in_channels, config.image_size, config.image_size, device=device) * 2 - 1
        mask = torch.ones(config.num_tokens, config.num_tokens, dtype=torch.bool, device=device).tril()
        labels = torch.arange(batch, device=device) % config.num_classes
        return TrainingInputs(model, _optimizer(model), images, labels, mask, dtype)

    def compiled(prepare: Callable, forward: Callable) -> Contender:
        return Contender(lambda inputs: prepare(inputs, torch.compile(forward, dynamic=False)))

    contenders = {backend: Contender(_blockwise, partial(use_backend, backend)) for backend in BACKENDS}
    notes = ["loss, gradients, AdamW", note]
    if dense:
        contenders |= {"eager": Contender(_dense_mask), "published": Contender(_published)}
    if compiles:
        contenders["compiled"] = compiled(_blockwise, _ours)
        notes.append("compiled block by block")
        if dense:
            contenders["compiled eager"] = compiled(_dense_mask, eager.forward)
    weights, attention = operations(config)
    layer_weights = config.num_blocks * config.layers_per_block * 12 * config.channels**2
    return Row(
        op="training step",
        model=name,
        shape={"B": batch, "N": config.num_tokens},
        dtype=dtype,
        bytes=24 * layer_weights,  # weights and the two moments of Adam, read and written
        operations=3 * batch * (weights + attention),
        contenders=contenders,
        draw=draw,
        expect=partial(_exact_step, dtype=getattr(torch, exact)),
        exact=exact,
        plain="eager" if dense else "torch",
        flush=False,
        images=batch,
        note="; ".join(filter(None, notes)),
    )
