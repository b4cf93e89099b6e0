"""Muon, which moves a matrix by an orthogonal one: the momentum of its gradient, with singular values of about one.

**What it is for.** A matrix that maps activations to activations, where a large gradient in a few directions hides the
others: the weights of the linear maps in the layers of a transformer. Query, key and value are three maps, stored as
one; each is made orthogonal by itself, or the largest gradient of the three would take the step of all.

**What it is not for**, and AdamW does: biases and the gains of norms, which are no matrices; the tables of positions
and classes, whose rows are looked up one at a time and owe each other nothing; the projections at both ends, on whose
other side are the values of a patch, mu and alpha, each with a scale of its own, where to move all directions alike
means nothing; and the convolutions of a dequantizer, whose weights have scales of their own too.

**Its learning rate** is that of AdamW, and so is its weight decay: ``match_rms_adamw`` multiplies the orthogonal matrix
by ``0.2 sqrt(max(rows, columns))``, so that a step changes weights by 0.2 of the learning rate in root mean square,
which is about what AdamW does.

Sources: Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024); Liu et al., *Muon is scalable
for LLM training* (arXiv 2502.16982) for the learning rate.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..transformer import TransformerLayer

__all__ = ["LayerMuon"]


class LayerMuon(torch.optim.Muon):
    """Muon over the matrices in the layers of a model's transformers; the gradients are those of the model's weights.

    State and step are those of ``torch.optim.Muon`` with Nesterov's momentum, which orthogonalizes one matrix after the
    other, in 15 small products each. Here all matrices of a shape go together: 45 products in a step of the default
    model in place of 720.

    Args:
        model: the model.
        weight_decay: decoupled weight decay.

    Attributes:
        weights: the weights of the model that it moves.
    """

    def __init__(self, model: nn.Module, weight_decay: float):
        split = [(weight, weight.detach().chunk(parts)) for weight, parts in _layer_weights(model)]
        self.weights = [weight for weight, _ in split]
        # Each shares the memory of a weight, or of a third of it.
        self.matrices = [(weight, [nn.Parameter(part) for part in parts]) for weight, parts in split]
        matrices = [matrix for _, parts in self.matrices for matrix in parts]
        super().__init__(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        for matrix in matrices:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @torch.no_grad()
    def step_unless(self, bad: Tensor) -> None:
        """Do a step, or none where ``bad``, a bool on the device: weights and momenta then stay, to the bit.

        The host does not look, and no activations take up memory at that time.
        """
        pairs: list[tuple[Tensor, Tensor]] = [
            (matrix, gradient)
            for weight, parts in self.matrices
            for matrix, gradient in zip(parts, _gradient(weight).chunk(len(parts)), strict=True)
        ]
        pairs.sort(key=lambda pair: pair[0].shape)
        for _, alike in groupby(pairs, key=lambda pair: pair[0].shape):
            self._move([*alike], bad)

    def _move(self, pairs: list[tuple[Tensor, Tensor]], bad: Tensor) -> None:
        """Move matrices of one shape by their gradients, given in pairs, unless ``bad``."""
        settings = self.param_groups[0]
        rate, momentum = settings["lr"], settings["momentum"]
        matrices = [matrix for matrix, _ in pairs]
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        weight, average = torch.stack(matrices), torch.stack(buffers)
        gradient = torch.stack([gradient for _, gradient in pairs])
        new_average = average.lerp(gradient, 1 - momentum)
        direction = orthogonalize(
            gradient.lerp(new_average, momentum), settings["ns_coefficients"], settings["ns_steps"], settings["eps"]
        )
        size = 0.2 * math.sqrt(max(weight.shape[1:]))
        new_weight = weight.mul(1 - rate * settings["weight_decay"]).add_(direction, alpha=-rate * size)
        torch._foreach_copy_(matrices, [*torch.where(bad, weight, new_weight)])
        torch._foreach_copy_(buffers, [*torch.where(bad, average, new_average)])


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices ``(M, rows, columns)`` to about one, by Newton and Schulz in bfloat16.

    ``X <- a X + (b X X^T + c (X X^T)^2) X``, from X of Frobenius norm one, transposed if it is tall; the result is
    bfloat16. Singular values end between 0.7 and 1.2 for Muon's coefficients, whose slope at zero is steep, so that
    five steps do for all but the smallest.
    """
    a, b, c = coefficients
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices.bfloat16() if wide else matrices.bfloat16().mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None, "every layer is in the loss"
    return weight.grad


def _layer_weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield the weights, each with the number of maps that are stored in it, one below the other."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        up, _, down = layer.mlp
        yield layer.qkv.weight, 3
        for linear in (layer.proj, up, down):
            yield linear.weight, 1
