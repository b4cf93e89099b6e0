"""Guided sampling: the sequential decoder against the eager one, the same weights and the same samples."""

import pytest
import torch

import eager
from models import CPU_ROWS, fashion_mnist, latents_and_labels
from tarflow import Guidance

GUIDANCE = Guidance(weight=2.0, schedule="linear")


@pytest.mark.parametrize("decoder", ["eager", "sequential"])
@pytest.mark.parametrize(("patch_size", "batch"), CPU_ROWS)
def test_guided_sampling(benchmark, patch_size, batch, decoder):
    """Latents to tokens, all four blocks; images/s in the extra info."""
    benchmark.group = f"guided sampling, 28x28, patch {patch_size}, batch {batch}"
    model = fashion_mnist(patch_size)
    z, labels = latents_and_labels(model, batch)
    decode = {
        "eager": lambda: eager.inverse(model.flow, z, labels, GUIDANCE),
        "sequential": lambda: model.flow.inverse(z, labels, GUIDANCE, decoder="sequential"),
    }
    samples = benchmark.pedantic(decode[decoder], rounds=5, warmup_rounds=1)
    benchmark.extra_info["images_per_second"] = batch / benchmark.stats["median"]
    torch.testing.assert_close(samples, decode["eager"](), atol=1e-4, rtol=0)
