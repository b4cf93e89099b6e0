"""What training takes is counted: operations by what runs, memory by what is held, shares of time by a profile."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tarflow import TarFlow, TarFlowConfig, hardware
from tarflow.cli import main
from tarflow.flowpp.config import FlowPPConfig
from tarflow.training.config import TrainingConfig
from tarflow.training.presets import PRESETS
from tarflow.training.throughput import memory, operations, share_of_time, training_operations

TINY = TarFlowConfig(image_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=3)


@pytest.mark.parametrize("expansion", [4, 2])
def test_the_operations_of_the_layers_are_those_of_their_products(expansion):
    config = replace(TINY, expansion=expansion)
    model = TarFlow(config)
    ends = 2 * config.num_tokens * config.token_dim * config.channels * 3 * config.num_blocks  # into C, to mu and alpha
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    products = sum(
        count
        for name, count in counter.get_flop_counts()["Global"].items()
        if "mm" in str(name) and "bmm" not in str(name)
    )
    assert operations(config)[0] == products - ends


def test_causal_attention_is_half_of_the_products_of_all_pairs():
    pairs = TINY.num_tokens * (TINY.num_tokens + 1) // 2
    assert operations(TINY)[1] == TINY.num_layers * pairs * TINY.channels * 2 * 2  # q k and its weights times v


def test_the_operations_of_a_flow_plus_plus_are_not_counted():
    assert training_operations(FlowPPConfig()) is None


def test_weights_are_split_and_activations_are_not():
    training = TrainingConfig(batch_size=32, accumulate=2)
    alone, of_four = (memory(TINY, training, 1000, 4, shards, itemsize=2) for shards in (1, 4))
    assert {name: part for name, part in alone.items() if "act" not in name} == {
        "weights": 4000, "gradients": 4000, "moments": 8000, "average": 4000
    }  # fmt: skip
    assert [of_four[name] * 4 for name in of_four if "act" not in name] == [4000, 4000, 8000, 4000]
    assert alone["activations of 4 images"] == of_four["activations of 4 images"] == 4 * TINY.activation_bytes(2)
    checkpointed = memory(TINY, replace(training, activation_checkpointing=True), 1000, 4, 1, itemsize=2)
    assert checkpointed["activations of 4 images"] * TINY.num_layers == alone["activations of 4 images"]


@pytest.mark.parametrize(
    ("spans", "share"), [([(0, 2)], 0.2), ([(0, 2), (1, 4)], 0.4), ([(6, 8), (0, 2), (1, 2)], 0.4), ([], 0.0)]
)
def test_a_share_of_time_counts_no_moment_twice(spans, share):
    events = [SimpleNamespace(name="gloo:all_reduce", time_range=SimpleNamespace(start=a, end=b)) for a, b in spans]
    events.append(SimpleNamespace(name="aten::mm", time_range=SimpleNamespace(start=0, end=10)))
    assert share_of_time(SimpleNamespace(events=lambda: events), "gloo:", 10e-6) == pytest.approx(share)


def test_utilization_is_logged_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "peak_operations", lambda device: 1e12)
    flags = [
        "--patch-size=7",
        "--channels=64",
        "--num-blocks=1",
        "--layers-per-block=1",
        "--max-steps=2",
        "--log-every=1",
    ]
    flags += ["--device=cpu", "--batch-size=4", "--no-calibrate"]
    for precision, known in ("bfloat16", True), ("float32", False):
        assert main(["train", f"--out={tmp_path / precision}", f"--precision={precision}", *flags]) == 0
        rows = [json.loads(line) for line in (tmp_path / precision / "metrics.jsonl").read_text().splitlines()]
        for row in (row for row in rows if "loss" in row):
            assert ("model_flop_utilization" in row) == known
            if known:
                config = TarFlow.from_pretrained(tmp_path / precision).config
                expected = row["images_per_second"] * training_operations(config) / 1e12
                assert row["model_flop_utilization"] == pytest.approx(expected)


@pytest.mark.parametrize(("itemsize", "more"), [(4, 1.0), (2, 1.25)])  # attention stays float32 on a CPU
def test_the_memory_of_activations_is_what_autograd_keeps(itemsize, more):
    config = TarFlowConfig(patch_size=4, channels=64, num_blocks=1, layers_per_block=6)
    model, kept = TarFlow(config), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=itemsize == 2):
        model(torch.zeros(64, 1, 28, 28))
    found = sum(size for address, (_, size) in kept.items() if address not in weights)
    assert found / 64 == pytest.approx(more * config.activation_bytes(itemsize), rel=0.1)


def test_the_published_model_of_imagenet_fits_eight_devices_at_its_published_batch():
    config, training = PRESETS["imagenet64-cond"].model, PRESETS["imagenet64-cond"].training
    needed = memory(config, training, 466_000_000, 8, 1, itemsize=2)
    assert sum(needed.values()) < 80e9


def test_memory_that_pytorch_keeps_of_a_gpu_is_free(monkeypatch):
    told = {"mem_get_info": (100, 1000), "memory_reserved": 700, "memory_allocated": 200}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert hardware.free_bytes(torch.device("cuda")) == 100 + 700 - 200


@pytest.mark.parametrize(
    ("told", "free"), [("MemFree:   1 kB\nMemAvailable:   5 kB\nCached:   4 kB\n", 5 * 1024), ("", 4 * 2**30)]
)
def test_memory_of_files_that_linux_has_read_is_free(monkeypatch, told, free):
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    assert hardware.free_bytes(torch.device("cpu")) == free


KEPT = """
import resource
import sys
from pathlib import Path

import torch
from tarflow.cli import main

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

main(["sample", "nowhere"])
before = resident()
tensors = [torch.ones(2_000_000) for _ in range(20)]
del tensors
print((resident() - before) / 160e6)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(
    ("environment", "least", "most"), [({}, 0.9, 1.1), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, -0.1, 0.1)]
)
def test_a_command_keeps_the_memory_of_freed_tensors_unless_the_environment_says_otherwise(environment, least, most):
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    found = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, env=plain | environment)
    assert least < float(found.stdout) < most
