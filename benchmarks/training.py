"""Rows of whole steps of training: loss, gradients and the update."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import eager
from models import TRAINING_ROWS, autocast, build, fashion_mnist, imagenet64, operations
from row import BACKENDS, Contender, Outputs, Row, Run
from tarflow import TarFlow, TarFlowConfig
from tarflow.model import patchify
from tarflow_kernels import use_backend


def training_rows(device: torch.device) -> list[Row]:
    """Of a device."""
    if device.type == "cuda":
        batch = 32 if torch.cuda.get_device_properties(device).total_memory > 100e9 else 16
        settings = batch, torch.bfloat16, "float32"
        # The logits under a dense mask of 64 layers may not fit; those of a block do.
        return [
            _training("ImageNet64 2-768-8-8", imagenet64(), *settings, dense=False),
            _training("ImageNet64 2-768-1-8", imagenet64(1), *settings, note="one of the model's eight blocks"),
        ]
    return [
        _training(f"28x28 patch {patch_size}", fashion_mnist(patch_size), batch, torch.float32, "float64")
        for patch_size, batch in TRAINING_ROWS
    ]


@dataclass(frozen=True)
class TrainingInputs:
    """A model, its optimizer and a batch; the learning rate is 0, so that contenders share their weights."""

    model: TarFlow
    optimizer: torch.optim.Optimizer
    tokens: Tensor
    labels: Tensor
    mask: Tensor
    dtype: torch.dtype


def _ours(block: torch.nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return block(tokens, labels)


def _loss(flow: torch.nn.Module, tokens: Tensor, labels: Tensor, forward: Callable) -> Tensor:
    """Negative log-likelihood in nats per dimension, up to a constant."""
    logdet, values = 0, tokens[0].numel()
    for block in flow.blocks:
        tokens, block_logdet = forward(block, tokens, labels)
        logdet = logdet + block_logdet
    return 0.5 * tokens.square().mean() - logdet.mean() / values


def _step(forward: Callable, inputs: TrainingInputs) -> Run:
    parameters = list(inputs.model.parameters())

    def run() -> Outputs:
        inputs.optimizer.zero_grad(set_to_none=True)
        with autocast(inputs.tokens.device, inputs.dtype):
            loss = _loss(inputs.model.flow, inputs.tokens, inputs.labels, forward)
        loss.backward()
        inputs.optimizer.step()
        return loss.detach(), [parameter.grad for parameter in parameters]

    return run


def _dense_mask(inputs: TrainingInputs, forward: Callable = eager.forward) -> Run:
    return _step(partial(forward, mask=inputs.mask), inputs)


def _exact_step(inputs: TrainingInputs, dtype: torch.dtype) -> Outputs:
    """Loss and gradients from a copy of the model, summed over parts of the batch of about a thousand tokens."""
    model = copy.deepcopy(inputs.model).to(dtype)
    size = max(1, 1024 // inputs.tokens.shape[1])
    parts = list(zip(inputs.tokens.to(dtype).split(size), inputs.labels.split(size), strict=True))
    total = 0.0
    for tokens, labels in parts:
        share = len(tokens) / len(inputs.tokens)
        loss = share * _loss(model.flow, tokens, labels, partial(eager.forward, mask=inputs.mask))
        loss.backward()
        total = total + loss.detach()
    return total, [parameter.grad for parameter in model.parameters()]


def _training(
    name: str,
    config: TarFlowConfig,
    batch: int,
    dtype: torch.dtype,
    exact: str,
    dense: bool = True,
    note: str = "",
) -> Row:
    """A row; ``dense`` is whether to measure attention through a dense mask too."""

    def draw(device: torch.device) -> TrainingInputs:
        model = build(config, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-4, fused=True)
        images = torch.rand(batch, config.in_channels, config.image_size, config.image_size, device=device) * 2 - 1
        mask = torch.ones(config.num_tokens, config.num_tokens, dtype=torch.bool, device=device).tril()
        labels = torch.arange(batch, device=device) % config.num_classes
        return TrainingInputs(model, optimizer, patchify(images, config.patch_size), labels, mask, dtype)

    contenders = {backend: Contender(partial(_step, _ours), partial(use_backend, backend)) for backend in BACKENDS}
    if dense:
        contenders["eager"] = Contender(_dense_mask)
    notes = ["loss, gradients, AdamW", note]
    if dtype == torch.bfloat16:
        contenders["compiled"] = Contender(lambda inputs: _step(torch.compile(_ours, dynamic=False), inputs))
        notes.append("compiled block by block")
    if dtype == torch.bfloat16 and dense:
        contenders["compiled eager"] = Contender(
            lambda inputs: _dense_mask(inputs, torch.compile(eager.forward, dynamic=False))
        )
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
