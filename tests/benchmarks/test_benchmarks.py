"""What measurements rest on: models with finite samples, contenders on equal terms, clocks that time nothing else."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import checkout
import device as devices
import models
import plots
import records
import sampling
import training
from row import Contender, Row
from tarflow import TarFlowConfig
from tarflow.model import patchify
from tarflow.published import to_published
from tarflow.transformer import Condition

CPU = torch.device("cpu")


def wide(channels, num_blocks=1, image_size=16):
    """A model of thin blocks, of 64 tokens, as wide as the published ones."""
    return TarFlowConfig(image_size, 3, 2, channels, num_blocks, layers_per_block=1, num_classes=3)


def test_alpha_of_a_random_model_spreads_alike_at_every_width():
    spreads = []
    for channels in (64, 256, 1024):
        model = models.build(wide(channels), CPU)
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            _, alpha = model.flow.blocks[0].transformer(
                patchify(x, model.config.patch_size), Condition(torch.tensor([0, 1, 2, 0]))
            )
        spreads.append(alpha.std())
    assert max(spreads) < 1.3 * min(spreads)
    assert min(spreads) > 0.02, "or there is nothing to decode"


@pytest.mark.parametrize("channels", [128, 768])
def test_a_random_model_draws_finite_samples_under_guidance(channels):
    model = models.build(wide(channels, 2), CPU)
    tokens = model.flow.inverse(*models.latents_and_labels(model, 8), models.GUIDANCE, "sequential")
    assert tokens.isfinite().all()
    assert tokens.abs().max() < 20


class Casts(TorchDispatchMode):
    """Counts how often tensors of so many elements are cast to bfloat16."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        low = (kwargs or {}).get("dtype") == torch.bfloat16
        self.count += low and op._schema.name == "aten::_to_copy" and args[0].numel() == self.size
        return op(*args, **(kwargs or {}))


def test_eager_code_casts_a_weight_once_and_not_for_every_token():
    config = wide(64, image_size=8)
    subject = sampling.Subject("small", config, partial(models.build, config))
    row = sampling.sampling_row(subject, 2, models.GUIDANCE, dtype=torch.bfloat16)
    run = row.contenders["eager"].prepare(row.draw(CPU))
    with Casts(3 * 64 * 64) as casts:
        run()
    assert casts.count == 1


def test_what_empties_the_cache_of_a_gpu_leaves_nothing_to_be_written_back(monkeypatch):
    clock = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: clock)
    scratch = torch.zeros(8)
    devices.seconds_by_events(lambda: None, scratch)
    assert scratch._version == 0


@pytest.fixture
def row_of(monkeypatch):
    """A row whose contenders are off by so much each, on a device of which nothing has to be measured first."""
    for ceiling in ("copy_rate", "matrix_rate"):
        monkeypatch.setattr(devices, ceiling, lambda *device: 1e9)
    monkeypatch.setattr(devices, "describe", lambda device: {})

    def off_by(error):
        return Contender(lambda inputs: lambda: (inputs + error,))

    def make(**errors):
        contenders = {name: off_by(error) for name, error in errors.items()}
        draw, expect = lambda device: torch.ones(4, device=device), lambda inputs: (inputs,)
        return Row("op", "model", {"B": 1}, torch.float32, 8.0, 8.0, contenders, draw, expect, plain="plain")

    return make


def fail(inputs):
    raise MemoryError("too much")


def test_a_row_whose_plain_contender_does_not_fit_still_tells_right_from_wrong(row_of):
    row = row_of(torch=1e-3, triton=1.5e-3, wrong=1.0, plain=0.0)
    row.contenders["plain"] = Contender(fail)
    record = records.measure(row, CPU, seconds=0.01).record
    assert "too much" in record["contenders"]["plain"]["unavailable"]
    assert list(records.timed(record)) == ["torch", "triton"]
    assert "inaccurate" in record["contenders"]["wrong"]


def test_contenders_that_are_compiled_are_left_out_unless_asked_for(row_of):
    row = row_of(plain=0.0, **{"compiled plain": 0.0})
    everything = records.measure(row, CPU, seconds=0.01, compiled=True).record
    assert list(records.timed(everything)) == ["plain", "compiled plain"]
    record = records.measure(row, CPU, seconds=0.01, compiled=False).record
    assert list(records.timed(record)) == ["plain"]
    assert "see --compiled" in record["contenders"]["compiled plain"]["unavailable"]


def test_a_model_of_many_layers_is_trained_without_a_dense_mask_and_a_block_of_it_with_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    whole, block = training.training_rows(torch.device("cuda"))
    assert set(whole.contenders) == {"triton", "torch", "compiled"}
    assert set(block.contenders) == {*whole.contenders, "eager", "published", "compiled eager"}
    assert {whole.plain, block.plain} == {"torch", "eager"}
    assert block.operations < whole.operations / 7


def test_gradients_of_the_published_model_are_compared_in_our_order_and_shapes():
    model = models.build(wide(64, num_blocks=2, image_size=8), CPU)
    ours = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    theirs = {name: SimpleNamespace(grad=gradient) for name, gradient in to_published(ours).items()}
    collected = checkout.gradients(SimpleNamespace(named_parameters=theirs.items), model)
    assert all(map(torch.equal, collected, ours.values()))
    assert len(collected) == len(ours)


def test_a_plot_names_every_commit_that_its_rows_are_of_in_the_order_of_measurement():
    machine = {"device": "a CPU", "torch": "2.13.0"}
    rows = [
        {"measured": day, "dtype": "float32", "machine": machine | {"commit": commit}}
        for day, commit in (("2026-11-03", "ccc"), ("2026-11-01", "aaa"), ("2026-11-02", "aaa"))
    ]
    assert plots._title(rows) == "a CPU, float32, torch 2.13.0, commit aaa, ccc"
