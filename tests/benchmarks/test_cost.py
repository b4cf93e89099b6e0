"""The cost model of decoding: it counts what the code does, and its times behave as times do."""

import itertools
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

import cost
import models
import predictions
import report
import sampling
from cost import BFLOAT16, DEVICES, SEQUENTIAL, Device
from launches import Launches
from tarflow import Decoder, Guidance, TarFlowConfig, TokenFlow
from tarflow.decoding.step import CachedStep, GraphRunner
from tarflow.training.presets import PRESETS
from tarflow.training.throughput import operations

H100 = DEVICES["H100 SXM"]
ONE_CHAIN = replace(H100, streams=1)
SHARES = {None: (0.2, 0.04), 64: (0.25, 0.08)}
PUBLISHED = [models.imagenet64(), models.imagenet128(), models.afhq256()]
every_model = pytest.mark.parametrize("config", [models.trained_config(), *PUBLISHED], ids=lambda c: c.summary)
every_batch = pytest.mark.parametrize("batch", [1, 2, 7, 32, 256])
every_branch = pytest.mark.parametrize("branches", [1, 2], ids=["alone", "guided"])
every_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


# What is counted ------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("rows", [1, 64])
def test_the_layers_of_a_step_move_weights_and_cache_once_and_the_activations(config, rows):
    """Of those, 34 elements per layer and channel are in bfloat16, and 4, of the residual, in float32."""
    layers = config.layers_per_block * cost.layer(config.channels, rows, 1, 10)
    activations = config.layers_per_block * rows * config.channels * (34 * 2 + 4 * 4)
    assert sum(k.bytes for k in layers) == models.step_bytes(config, rows, 10, BFLOAT16) + activations
    assert sum(k.weights + k.cache for k in layers) == models.step_bytes(config, rows, 10, BFLOAT16)


@every_model
def test_a_pass_over_whole_sequences_multiplies_as_often_as_scoring(config):
    one_block = replace(config, num_blocks=1)
    by_layers = sum(operations(one_block))
    kernels = cost.jacobi_pass(config, 1, 1, None, H100)
    counted = sum(kernel.operations for kernel in kernels if kernel.name not in ("tokens", "mu and alpha"))
    assert counted == pytest.approx(by_layers, rel=2 / config.num_tokens)


def launches_of(monkeypatch, method, decoder, guidance, num_layers):
    """How many kernels the calls of a method of the decoder's parts launch, each."""
    owner, name = method
    original, counts = getattr(owner, name), []

    def counted(self, *args):
        before = launches.count
        result = original(self, *args)
        counts.append(launches.count - before)
        return result

    monkeypatch.setattr(owner, name, counted)
    flow = TokenFlow(13, 2, 16, 1, num_layers, head_dim=8, num_classes=3)
    with Launches(monkeypatch) as launches:
        flow.inverse(torch.randn(2, 13, 2), torch.tensor([0, 1]), guidance, decoder)
    return set(counts)


def predicted_launches(kernels):
    return sum(kernel.launches for kernel in kernels)


def small(num_layers):
    return TarFlowConfig(image_size=8, channels=64, layers_per_block=num_layers, num_blocks=1)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_layers_of_a_step_launch_the_kernels_that_are_counted(monkeypatch, num_layers):
    cpu = Device("", 1, 1, 0)
    layers = predicted_launches(cost.run_layers(small(num_layers), 4, 1, 5, cpu))
    assert launches_of(monkeypatch, (CachedStep, "run_layers"), "sequential", Guidance(1.0), num_layers) == {layers}
    assert predicted_launches(cost.step(small(num_layers), 4, cpu)) == layers + 1 == 8 * num_layers + 3


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(("branches", "guidance"), [(1, None), (2, Guidance(1.0))])
def test_a_jacobi_pass_launches_the_kernels_that_are_counted(monkeypatch, num_layers, branches, guidance):
    kernels = cost.jacobi_pass(small(num_layers), 2, branches, 4, Device("", 1, 1, 0))
    counted = launches_of(monkeypatch, (GraphRunner, "__call__"), Decoder("jacobi", 4), guidance, num_layers)
    assert counted == {predicted_launches(kernels)}


def test_attention_of_few_rows_and_heads_is_split_and_merged():
    few, many = (predicted_launches(cost.step(models.imagenet64(), rows, H100)) for rows in (2, 64))
    assert few == many + models.imagenet64().layers_per_block


# Times ----------------------------------------------------------------------------------------------------------------


def decoders(config, batch, branches, device):
    return {
        "sequential": cost.sequential(config, batch, branches, device),
        "jacobi": cost.jacobi(config, batch, branches, None, SHARES[None], device),
        "jacobi, window 64": cost.jacobi(config, batch, branches, 64, SHARES[64], device),
        "auto": cost.auto(config, batch, branches, SHARES, device),
    }


@pytest.mark.parametrize("larger", [
    {"batch": 64}, {"image_size": 128}, {"layers_per_block": 16}, {"channels": 1536}, {"num_blocks": 16}
], ids=lambda larger: f"{next(iter(larger))}")  # fmt: skip
def test_more_of_anything_takes_longer(larger):
    batch = larger.pop("batch", 32)
    config = replace(models.imagenet64(), **larger)
    before, after = decoders(models.imagenet64(), 32, 2, H100), decoders(config, batch, 2, H100)
    assert all(after[name] > before[name] for name in before)


@every_model
@every_branch
@every_device
def test_time_grows_with_the_batch_and_that_of_an_image_falls(config, branches, device):
    batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    # Where the rule begins to split a batch, it does so whether or not that is faster.
    times = [decoders(config, batch, branches, replace(device, streams=1)) for batch in batches]
    for small_batch, large_batch in itertools.pairwise(times):
        assert all(small_batch[name] < large_batch[name] <= 2 * small_batch[name] for name in small_batch)


@every_model
@every_batch
@every_branch
@every_device
def test_no_step_is_faster_than_its_weights_and_cache_are_read(config, batch, branches, device):
    floor = cost.floor(config, batch, branches, device)
    assert floor < cost.sequential(config, batch, branches, device)
    assert floor < cost.sequential(config, batch, branches, replace(device, streams=1))


@every_model
@every_batch
@every_branch
def test_auto_is_no_slower_than_any_decoder(config, batch, branches):
    times = decoders(config, batch, branches, H100)
    assert times["auto"] <= min(times.values())


@every_model
def test_a_step_of_one_sample_is_mostly_launches(config):
    kernels = cost.step(config, 1, H100)
    assert cost.seconds(kernels, H100) < 1.5 * H100.launch * predicted_launches(kernels)


@every_batch
@every_branch
def test_halves_hide_launches_but_no_bytes(batch, branches):
    """They read the weights once more than one chain does."""
    config = models.imagenet64()
    one_chain = cost.step_seconds(config, batch, branches, ONE_CHAIN)
    taken = cost.step_seconds(config, batch, branches, H100)
    launching = H100.launch * predicted_launches(cost.step(config, branches * batch, H100))
    if cost.in_halves(config, batch, branches):
        assert one_chain - launching < taken < one_chain
    else:
        assert taken == one_chain


@pytest.mark.parametrize("window", [1, 16, None])
def test_windows_are_no_fewer_than_it_takes_to_cover_the_sequence(window):
    config = models.imagenet64(1)
    windows = math.ceil((config.num_tokens - 1) / (window or config.num_tokens))
    taken = cost.jacobi(config, 1, 1, window, (0.0, 0.0), H100)
    assert taken == cost.block_seconds(config, 1, 1, Decoder("jacobi", window), windows, H100)


def test_a_guided_step_of_the_large_model_agrees_with_a_simulation_of_its_compiled_kernels():
    """It has, for 64 rows, a limit of 306 us, about 530 us for one chain and about 400 us for halves."""
    config, batch = models.imagenet64(), 32
    steps = config.num_blocks * (config.num_tokens - 1)
    assert cost.floor(config, batch, 2, H100) / steps == pytest.approx(306e-6, rel=0.02)
    assert cost.step_seconds(config, batch, 2, ONE_CHAIN) == pytest.approx(530e-6, rel=0.1)
    assert cost.step_seconds(config, batch, 2, H100) == pytest.approx(400e-6, rel=0.1)


# The check, the page, the report --------------------------------------------------------------------------------------


def test_the_check_measures_what_it_predicts_one_size_varied_at_a_time(tmp_path):
    path, base = tmp_path / "new" / "check.json", {"batch": 2, "tokens": 16, "channels": 8, "layers": 1}
    cost.check(path, base, {"batch": (1, 3), "tokens": (36,)}, duration=0)
    checked = json.loads(path.read_text())
    assert set(checked["constants"]) == {"copy", "matrix", "launch"}
    assert "commit" in checked["machine"]
    points = checked["points"]
    assert [(p["varied"], p["batch"], p["tokens"]) for p in points[::3]] == [
        ("batch", 1, 16), ("batch", 3, 16), ("tokens", 2, 36)
    ]  # fmt: skip
    assert [(p["decoder"], p["passes"]) for p in points[-3:]] == [
        ("sequential", 35), ("jacobi, window 16", 3), ("jacobi", 1)
    ]  # fmt: skip
    assert all(point["predicted"] > 0 and point["measured"] > 0 for point in points)


def test_every_preset_and_published_model_of_like_blocks_is_predicted():
    families = predictions.families()
    presets = [preset for _, presets in families.values() for preset in presets]
    flows = {name: settings.model for name, settings in PRESETS.items() if isinstance(settings.model, TarFlowConfig)}
    assert sorted(presets) == sorted(name for name in flows if isinstance(flows[name].layers_per_block, int))
    predicted = {PRESETS[preset].model for preset in presets}
    assert {replace(config, num_classes=0) for config in PUBLISHED} <= predicted


def test_the_page_begins_by_saying_that_nothing_was_measured(tmp_path, monkeypatch):
    point = {"varied": "batch", "decoder": "sequential", "predicted": 1.0, "measured": 2.0}
    constants = {"copy": 1e10, "matrix": 1e11, "launch": 1e-5}
    machine = {"device": "Some CPU", "driver": "2 threads", "torch": "2", "commit": "abc"}
    check = tmp_path / "check.json"
    points = [point, point | {"predicted": 2.0, "measured": 4.0}]
    check.write_text(json.dumps({"machine": machine, "constants": constants, "points": points}))
    monkeypatch.setattr(cost, "CHECK", check)
    monkeypatch.setattr(sys, "argv", ["predictions.py", "--docs", str(tmp_path)])
    predictions.main()
    first, *_ = page = (tmp_path / "predictions.md").read_text().splitlines()
    assert "nothing on this page was measured on a GPU" in first
    assert "| batch | 1.00, 2.00 |" in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"predicted-decoding.png", "predicted-check.png"}


def test_the_rows_of_sampling_on_a_gpu_are_all_predicted():
    assert {row.model for row in sampling.sampling_rows(torch.device("cuda"))} <= cost.covered().keys()


def measured(device, **contenders):
    """A row as it is recorded, of contenders that took a second each."""
    taken = {"p20": 0.9, "p50": 1.0, "p80": 1.1, "percent_of_limit": 50.0, "images_per_second": 8.0}
    return {
        "name": "row", "op": "guided sampling", "model": "ImageNet64 2-768-1-8", "shape": {"B": 8, "N": 1024},
        "dtype": "bfloat16", "note": "", "bytes": 1.0, "operations": 1.0, "bound": "copy",
        "machine": {"device": device, "driver": "1", "torch": "2", "triton": "3", "commit": "abc"},
        "contenders": {name: taken | {"by_block": [block]} for name, block in contenders.items()},
    }  # fmt: skip


def written_report(tmp_path, monkeypatch, row):
    (tmp_path / "card.json").write_text(json.dumps({"rows": {"row": row}}))
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(tmp_path), "--docs", str(tmp_path)])
    report.main()
    return (tmp_path / "benchmarks.md").read_text()


def test_the_report_has_prediction_and_measurement_side_by_side(tmp_path, monkeypatch):
    row = measured(H100.name, sequential="1023/1023", auto="80/1023 by jacobi, window 64")
    page = written_report(tmp_path, monkeypatch, row)
    _, _, section = page.partition("### Predicted and measured")
    config = models.imagenet64(1)
    expected = {
        "sequential": cost.block_seconds(config, 8, 2, SEQUENTIAL, 1023, H100),
        "auto": cost.block_seconds(config, 8, 2, Decoder("jacobi", 64), 80, H100),
    }
    for name, taken in expected.items():
        times = f"{1e3 * taken:.3g} ms | 1000 ms | {1 / taken:.2f}"
        assert f"| guided sampling, ImageNet64 2-768-1-8, B=8 | {name} | {times} |" in section


def test_the_report_has_kernels_beside_what_their_machine_code_says():
    shape = {"B": 32, "H": 12, "N": 1024, "D": 64}
    row = measured(H100.name, triton="") | {"op": "causal_attention", "model": "ImageNet64 patch 2", "shape": shape}
    page = report.page({"card": {"rows": {"row": row}}})
    name = "causal_attention, B=32 H=12 N=1024 D=64, bfloat16"
    predicted = json.loads(report.KERNELS.read_text())["predictions"][name]["microseconds"]
    assert f"| {name} | triton | {predicted / 1e3:.3g} ms | 1000 ms | {1e6 / predicted:.2f} |" in page


@pytest.mark.parametrize("device", [H100.name, "Some GPU"])
@pytest.mark.parametrize("unknown", [{"model": "another"}, {"dtype": "float32"}, {}], ids=str)
def test_the_report_predicts_nothing_of_what_the_model_does_not_know(tmp_path, monkeypatch, device, unknown):
    page = written_report(tmp_path, monkeypatch, measured(device, sequential="1023/1023") | unknown)
    assert ("Predicted" in page) == (device == H100.name and not unknown)
