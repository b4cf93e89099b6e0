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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..transformer import TransformerLayer

__all__ = ["LayerMuon"]


class LayerMuon(torch.optim.Muon):
    """Muon over the matrices in the layers of a model's transformers; the gradients are those of the model's weights.

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

        Muon has no switch for that, and gradients of zero would move both. So they are copied before and restored
        after, without the host looking, at a time when no activations take up memory.
        """
        for weight, parts in self.matrices:
            assert weight.grad is not None, "every layer is in the loss"
            for matrix, gradient in zip(parts, weight.grad.chunk(len(parts)), strict=True):
                matrix.grad = gradient
        changing = [*self.weights, *(state["momentum_buffer"] for state in self.state.values())]
        before = [tensor.clone() for tensor in changing]
        self.step()
        for tensor, old in zip(changing, before, strict=True):
            tensor.copy_(torch.where(bad, old, tensor))
        self.zero_grad()


def _layer_weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield the weights, each with the number of maps that are stored in it, one below the other."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        up, _, down = layer.mlp
        yield layer.qkv.weight, 3
        for linear in (layer.proj, up, down):
            yield linear.weight, 1
