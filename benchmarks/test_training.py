"""A training step, forward and backward: causal attention against a dense mask and against the explicit softmax."""

import pytest
import torch

import eager
from models import TRAINING_ROWS, fashion_mnist
from tarflow.patches import patchify
from tarflow_kernels import use_backend


def reference(model, x, labels):
    """The explicit softmax over all keys."""
    with use_backend("reference"):
        return fast(model, x, labels)


def dense_mask(model, x, labels):
    """Attention through a dense mask."""
    return eager.loss(model.flow, patchify(x, model.config.patch_size), labels)


def fast(model, x, labels):
    """The model as it is trained."""
    z, logdet = model(x, labels)
    return 0.5 * z.square().mean() - logdet.mean() / model.config.num_dims


@pytest.mark.parametrize("contender", [reference, dense_mask, fast])
@pytest.mark.parametrize(("patch_size", "batch"), TRAINING_ROWS)
def test_training_step(benchmark, patch_size, batch, contender):
    """Loss and gradients of all weights, in float32; images/s in the extra info."""
    benchmark.group = f"training step, 28x28, patch {patch_size}, batch {batch}"
    model = fashion_mnist(patch_size)
    x, labels = torch.rand(batch, 1, 28, 28) * 2 - 1, torch.arange(batch) % 10

    def step():
        model.zero_grad()
        loss = contender(model, x, labels)
        loss.backward()
        return loss

    loss = benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info["images_per_second"] = batch / benchmark.stats["median"]
    torch.testing.assert_close(loss, fast(model, x, labels), atol=1e-5, rtol=0)
