"""A TarFlow scores, denoises, samples and stores images as it says, and says what is wrong with what it is given."""

import contextlib
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import MultivariateNormal, Uniform
from torch.testing import assert_close

from helpers import draw, tarflow
from tarflow import (
    Decoder,
    FlowPP,
    FlowPPConfig,
    Guidance,
    ImageFlow,
    TarFlow,
    TarFlowConfig,
    hardware,
    load_pretrained,
)
from tarflow.decoding import calibration
from tarflow.denoising import Denoising, tweedie
from tarflow.evaluation import evaluate
from tarflow.model import patchify, unpatchify
from tarflow.noise import add_gaussian_noise, add_uniform_noise, bits_per_dim

PIXELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
LABELS = torch.tensor([0, 1, 2, -1, 1])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_uniform_noise_stays_within_the_bin_of_its_pixel():
    noisy = torch.stack([add_uniform_noise(PIXELS, seeded(seed)) for seed in range(50)])
    assert torch.equal(((noisy + 1) * 128).floor(), PIXELS.float().expand(noisy.shape))
    offset = (noisy + 1) * 128 % 1
    assert 0 <= offset.min() < 0.01 < 0.99 < offset.max()


def test_gaussian_noise_is_sigma_around_the_pixel():
    clean = add_gaussian_noise(PIXELS, 0.0)
    assert_close(clean, torch.linspace(-1, 1, 256).view(1, 1, 16, 16))
    eps = torch.stack([add_gaussian_noise(PIXELS, 0.3, seeded(seed)) - clean for seed in range(50)]) / 0.3
    assert abs(eps.mean()) < 0.02
    assert abs(eps.std() - 1) < 0.02


def test_every_one_of_256_levels_costs_8_bits_where_all_are_equally_likely():
    log_prob = Uniform(-1.0, 1.0).log_prob(add_uniform_noise(PIXELS, seeded())).sum((1, 2, 3))
    assert_close(bits_per_dim(log_prob, 256), torch.tensor([8.0]))


def test_bits_of_an_untrained_model_are_those_of_a_standard_normal():
    model = TarFlow(TarFlowConfig(image_size=16, patch_size=4, channels=64))
    x = add_uniform_noise(PIXELS, seeded())
    expected = 7 + (0.5 * x.square().mean() + 0.5 * math.log(2 * math.pi)) / math.log(2)
    assert_close(bits_per_dim(model.log_prob(x), model.config.num_dims), expected.view(1))


def test_tweedie_is_exact_for_gaussian_data():
    mean, factor = draw(0, 4), draw(1, 4, 4)
    covariance, sigma, y = factor @ factor.T, 0.7, draw(2, 3, 4)
    noisy = covariance + sigma**2 * torch.eye(4)
    expected = mean + (y - mean) @ torch.linalg.solve(noisy, covariance)
    assert_close(tweedie(MultivariateNormal(mean, noisy).log_prob, y, sigma), expected)


@pytest.mark.parametrize("coupling", ["affine", "mixture"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_denoise_follows_the_slope_of_the_density(mode, coupling):
    model = tarflow(image_size=2, patch_size=1, num_classes=2, coupling=coupling)
    y, labels, sigma, h = draw(0, 2, 1, 2, 2), torch.tensor([1, -1]), 0.3, 1e-5
    score = torch.empty_like(y)
    for row in range(2):
        for column in range(2):
            step = torch.zeros_like(y)
            step[:, :, row, column] = h
            rise = model.log_prob(y + step, labels) - model.log_prob(y - step, labels)
            score[:, 0, row, column] = rise.detach() / (2 * h)
    with mode():
        assert_close(model.denoise(y, sigma, labels), y + sigma**2 * score, atol=1e-8, rtol=0)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 6])
def test_patches_make_the_image_again(patch_size):
    images = draw(0, 2, 3, 6, 6)
    tokens = patchify(images, patch_size)
    assert tokens.shape == (2, (6 // patch_size) ** 2, 3 * patch_size**2)
    assert torch.equal(unpatchify(tokens, patch_size, 6), images)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_without_noise_levels_samples_are_denoised_again_and_again_at_the_noise_of_training(steps):
    model = tarflow(num_classes=3)
    images, frames = model.sample(
        5, LABELS, denoise_sigma=0.1, generator=seeded(), return_trajectory=True, denoising=Denoising(steps)
    )
    expected = [model.inverse(model.flow.sample_prior(5, seeded()), LABELS)]
    for _ in range(steps):
        expected.append(model.denoise(expected[-1], 0.1, LABELS))
    assert_close(images, expected[-1])
    assert_close(frames[-steps:], torch.stack(expected[:-1]))


@pytest.mark.parametrize("coupling", ["affine", "mixture"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 100])
def test_samples_are_those_of_the_generator_whatever_the_chunks(chunk_size, coupling):
    model, finished = tarflow(num_classes=3, coupling=coupling), []
    images, frames = model.sample(
        5, LABELS, Guidance(0.5), 0.1, generator=seeded(), return_trajectory=True, chunk_size=chunk_size,
        progress=lambda decoded: finished.append(decoded.batch),
    )  # fmt: skip
    z = model.flow.sample_prior(5, seeded())
    noisy = model.inverse(z, LABELS, Guidance(0.5))
    assert_close(images, model.denoise(noisy, 0.1, LABELS))
    assert frames.shape == (4, 5, 1, 4, 4)
    assert_close(frames[0], unpatchify(z, 2, 4))
    assert_close(frames[-1], noisy)
    assert_close(model.sample(5, LABELS, Guidance(0.5), generator=seeded(), chunk_size=chunk_size), noisy)
    assert not torch.isclose(model.sample(5, LABELS, Guidance(0.5), generator=seeded(1)), noisy).any()
    size = chunk_size or 5
    assert finished == [min(size, 5 - start) for start in range(0, 5, size) for _ in model.flow.blocks]


@pytest.mark.parametrize("coupling", ["affine", "mixture"])
def test_a_chunk_is_what_fits_into_memory(monkeypatch, coupling):
    model, finished = tarflow(num_classes=3, coupling=coupling), []
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 2 * 2 * model.config.decoding_bytes(branches=2))
    model.sample(5, LABELS, progress=lambda decoded: finished.append(decoded.batch))
    assert finished == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_memory_counts_what_the_mixtures_take():
    """In training the parameters of every block at least; in decoding those of one block, of all branches, and more."""
    affine, mixture = (TarFlowConfig(coupling=coupling, num_mixtures=5) for coupling in ("affine", "mixture"))
    parameters = 4 * 3 * 5 * affine.num_dims
    assert mixture.activation_bytes() - affine.activation_bytes() >= affine.num_blocks * parameters
    for branches in (1, 2):
        more = mixture.decoding_bytes(branches) - affine.decoding_bytes(branches)
        assert more > (branches + 1) * parameters


def test_memory_is_that_of_all_blocks_in_training_and_of_the_largest_in_decoding():
    small, large = (TarFlowConfig(channels=64 * k, num_blocks=1, layers_per_block=k) for k in (1, 3))
    both = TarFlowConfig(channels=(64, 192), num_blocks=2, layers_per_block=(1, 3))
    assert both.num_layers == 4
    for itemsize in (2, 4):
        assert both.activation_bytes(itemsize) == sum(one.activation_bytes(itemsize) for one in (small, large))
        assert both.decoding_bytes(2, itemsize) == large.decoding_bytes(2, itemsize)
    assert both.summary.startswith("TarFlow 4-64/192-2-1/3 ")


def test_samples_of_a_volume_preserving_model_have_the_tracked_variance():
    model = TarFlow(TarFlowConfig(image_size=4, patch_size=2, channels=64, volume_preserving=True))
    model.flow.update_prior(draw(0, 8, 4, 4, dtype=torch.float32) * 3, rate=1.0)
    eps = torch.randn(2, 4, 4, generator=seeded())
    assert_close(model.sample(2, generator=seeded()), unpatchify(eps * model.flow.prior_variance.sqrt(), 2, 4))


@pytest.fixture
def saved(tmp_path):
    """A model and the folder that it was saved to."""
    model = tarflow(dtype=torch.float32, in_channels=2, num_classes=3, volume_preserving=True)
    model.flow.prior_variance.copy_(draw(0, 4, 8).exp())
    model.save_pretrained(tmp_path / "a" / "model")
    return model, tmp_path / "a" / "model"


def same(a, b):
    return a.config == b.config and all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_what_was_saved_comes_back(saved, monkeypatch):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    hub = SimpleNamespace(snapshot_download=lambda name, **_: {"someone/model": folder}[name])
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for source in (folder, str(folder), "someone/model"):
        assert same(TarFlow.from_pretrained(source), model)


def test_a_mixture_that_was_saved_comes_back(tmp_path):
    model = tarflow(dtype=torch.float32, coupling="mixture", num_mixtures=3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["coupling"] == "mixture"
    assert same(TarFlow.from_pretrained(tmp_path), model)


def test_a_configuration_from_before_there_were_couplings_is_affine(saved):
    path = saved[1] / "config.json"
    before = json.loads(path.read_text())["model"]
    del before["coupling"], before["num_mixtures"]
    path.write_text(json.dumps({"model": before}))
    assert same(TarFlow.from_pretrained(saved[1]), saved[0])


def test_the_trained_model_of_the_benchmarks_is_still_read():
    folder = Path(__file__).parents[2] / "benchmarks" / "trained" / "fashion-mnist"
    assert "coupling" not in json.loads((folder / "config.json").read_text())["model"]
    assert TarFlow.from_pretrained(folder).config.coupling == "affine"


def test_blocks_of_their_own_sizes_come_back(tmp_path):
    model = tarflow(dtype=torch.float32, num_blocks=2, channels=[16, 32], layers_per_block=(3, 1))
    model.save_pretrained(tmp_path)
    assert same(TarFlow.from_pretrained(tmp_path), model)
    assert model.config.channels == (16, 32)


def test_equal_sizes_of_all_blocks_are_one():
    assert TarFlowConfig(num_blocks=2, layers_per_block=(3, 3)) == TarFlowConfig(num_blocks=2, layers_per_block=3)


def test_saving_replaces_what_was_saved(saved):
    model, folder = saved
    other = tarflow(seed=1, dtype=torch.float32)
    other.save_pretrained(folder)
    assert same(TarFlow.from_pretrained(folder), other)
    assert not same(other, model)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", ""])
def test_a_missing_file_is_named(saved, missing):
    _, folder = saved
    (folder / (missing or "config.json")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^source: expected .* no .*{missing}"):
        TarFlow.from_pretrained(folder if missing else folder / "nowhere")


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r'^source: no folder .*pip install "tarflow\[hub\]"'):
        TarFlow.from_pretrained("someone/model")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(saved, keep):
    weights = saved[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt"):
        TarFlow.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model": {"depth": 1}}', '{"model": {"channels": 0}}', "\udcff"]
)
def test_a_corrupt_configuration_is_refused(saved, text):
    (saved[1] / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json: (truncated or corrupt|expected the configuration of a )"):
        TarFlow.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "change",
    [{"channels": 64}, {"num_blocks": 4}, {"num_blocks": 2}, {"num_classes": 0}, {"volume_preserving": False}],
    ids=str,
)
def test_weights_of_another_configuration_are_refused(saved, change):
    path = saved[1] / "config.json"
    path.write_text(json.dumps({"model": json.loads(path.read_text())["model"] | change}))
    with pytest.raises(ValueError, match=r"weights of another configuration: expected flow\..* of shape .*; got "):
        TarFlow.from_pretrained(saved[1])


def write_settings(folder, **changes):
    """Change what config.json says beside and, with ``model``, of the shape of a model."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | changes))
    return path


def change_shape(folder, **changes):
    return write_settings(folder, model=json.loads((folder / "config.json").read_text())["model"] | changes)


@contextlib.contextmanager
def one_more_gibibyte():
    """Within the block no more than that can be allocated, where the system can say so."""
    resource = pytest.importorskip("resource")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_is_known_of_a_model_comes_with_it(saved):
    model, folder = saved
    again, settings = load_pretrained(folder)
    assert same(again, model)
    assert settings == {"sigma": 0.0, "denoising_steps": None, "guidance": None, "class_names": [], "train": {}}
    known = {"sigma": 0.5, "denoising_steps": 2, "guidance": {"weight": 3.0}, "class_names": ["a", "b"]}
    known |= {"train": {"dataset": "mnist"}, "else": 1}
    write_settings(folder, **known)
    assert load_pretrained(str(folder))[1] == known


class Sharper(TarFlow):
    """A flow of someone's own."""


class Sharpest(Sharper):
    """One derived from that."""


@pytest.mark.parametrize("kind", [TarFlow, Sharper, Sharpest])
def test_a_class_reads_itself_and_what_is_derived_from_it(tmp_path, kind):
    kind(tarflow().config).save_pretrained(tmp_path)
    for asked in (ImageFlow, TarFlow, Sharper, Sharpest):
        if issubclass(kind, asked):
            assert type(asked.from_pretrained(tmp_path)) is kind
        else:
            with pytest.raises(ValueError, match=rf"config\.json: flow: expected .*{asked.__name__}"):
                asked.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["Unheard", "ImageFlow", "", None, 3, ["TarFlow"], {"TarFlow": 1}], ids=str)
def test_a_class_that_nobody_defined_is_refused_by_name(saved, name):
    write_settings(saved[1], flow=name)
    with pytest.raises(ValueError, match=r"config\.json: flow: expected .*TarFlow or .* imported; got "):
        ImageFlow.from_pretrained(saved[1])


NO_SIZES = (0, -1, 10**18, 10**30, True, 4.0, math.nan, "4", None, [4], {})
SIZES = ("image_size", "in_channels", "patch_size", "channels", "num_blocks", "layers_per_block", "num_classes",
         "head_dim", "expansion", "num_mixtures")  # fmt: skip


@pytest.mark.parametrize("value", NO_SIZES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_no_model_has_is_refused_by_name(saved, name, value):
    if (name, value) == ("num_classes", 0):
        return
    change_shape(saved[1], **{name: value})
    with one_more_gibibyte(), pytest.raises(ValueError, match=rf"config\.json: .*; {name}: expected an integer in \["):
        TarFlow.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "shape",
    [{"num_blocks": 10**6}, {"image_size": 21_000}, {"image_size": 8192}, {"channels": 65_536}, {"num_classes": 10**6},
     {"expansion": 64, "channels": 32_768}, {"num_blocks": 1024, "layers_per_block": 1024},
     {"num_blocks": 512, "layers_per_block": 2}, {"image_size": 8192, "in_channels": 65_536}],
    ids=str,
)  # fmt: skip
def test_a_small_file_takes_little_memory_whatever_it_asks_for(saved, shape):
    change_shape(saved[1], **shape)
    with one_more_gibibyte(), pytest.raises(ValueError, match=r"expected "):
        TarFlow.from_pretrained(saved[1])


def test_integers_of_numpy_are_sizes():
    config = TarFlowConfig(image_size=np.int64(8), patch_size=np.int32(4))
    assert config == TarFlowConfig(image_size=8, patch_size=4)
    assert json.dumps(config.image_shape) == "[1, 8, 8]"


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "truncated or corrupt"),
        ('{"model": ' + DEEP + "}", "truncated or corrupt"),
        ("null", "expected the configuration of a flow; got NoneType"),
        ('{"model": {"volume_preserving": 1}}', "volume_preserving: expected True or False; got 1"),
        ('{"model": {"coupling": ["affine"]}}', "coupling: expected one of affine, softplus, mixture; got "),
        ('{"model": null}', "model: expected an object; got None"),
        ('{"model": [1]}', r"model: expected an object; got \[1\]"),
        ('{"model": {"dequantizer": 5}}', "dequantizer: expected an object or null; got 5"),
        ('{"model": {"dequantizer": []}}', r"dequantizer: expected an object or null; got \[\]"),
        ('{"model": {"dequantizer": {"filters": "8"}}}', "filters: expected an integer in"),
        ('{"model": {"dequantizer": {"stack": 8}}}', "stack: expected a string; got 8"),
        ('{"model": {"dequantizer": {"stack": "stripe99999999"}}}', "stack: expected at most 1024 layers in all; got"),
        ('{"model": {"image_size": 9, "patch_size": 3, "dequantizer": {}}}', "stack: expected even sizes"),
        ('{"train": null, "model": {}}', "train: expected an object; got None"),
        ('{"train": [], "model": {}}', r"train: expected an object; got \[\]"),
        ('{"class_names": 5, "model": {}}', "class_names: expected a list of strings; got 5"),
        ('{"class_names": [1, "b"], "model": {}}', "class_names: expected a list of strings; got "),
        ('{"sigma": NaN, "model": {}}', "sigma: expected a number in .*; got nan"),
        ('{"sigma": 1e300, "model": {}}', "sigma: expected a number in .*; got "),
        ('{"sigma": -0.1, "model": {}}', "sigma: expected a number in .*; got -0.1"),
        ('{"sigma": true, "model": {}}', "sigma: expected a number in .*; got True"),
        ('{"sigma": "0.1", "model": {}}', "sigma: expected a number in .*; got '0.1'"),
    ],
)
def test_a_configuration_of_wrong_types_is_refused_by_name(saved, text, message):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        TarFlow.from_pretrained(saved[1])


def rewrite_weights(folder, change):
    """The weights, changed, as another program writes them: without a checksum."""
    path = folder / "model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


def test_any_flipped_bit_of_the_weights_is_noticed(saved):
    path = saved[1] / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in torch.randint(start, len(data), (30,), generator=seeded()).tolist():
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"model\.safetensors: corrupt"):
            TarFlow.from_pretrained(saved[1])
    path.write_bytes(data)
    assert same(TarFlow.from_pretrained(saved[1]), saved[0])


def test_weights_without_a_checksum_are_read(saved):
    rewrite_weights(saved[1], torch.clone)
    assert same(TarFlow.from_pretrained(saved[1]), saved[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_any_precision_score_denoise_and_sample(tmp_path, dtype):
    tarflow(dtype=torch.float32, num_classes=3).to(dtype).save_pretrained(tmp_path)
    model = TarFlow.from_pretrained(tmp_path)
    assert model.dtype == torch.promote_types(dtype, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, stored[name].to(model.dtype)) for name, tensor in model.state_dict().items())
    pixels, labels = PIXELS[:, :, :4, :4], TWO[:1]
    assert model.log_prob(X[:1].to(model.dtype), labels).isfinite().all()
    assert model.sample(2, TWO, denoise_sigma=0.1).isfinite().all()
    for sigma in (0.0, 0.1):
        assert all(
            math.isfinite(score.mean) for score in evaluate(model, pixels, labels, sigma, num_samples=1).values()
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_not_of_a_precision_to_compute_in_are_refused(saved, dtype):
    rewrite_weights(saved[1], lambda tensor: tensor.to(dtype))
    with pytest.raises(ValueError, match=rf"expected flow\..* in float16, bfloat16, float32, float64; got {dtype}"):
        TarFlow.from_pretrained(saved[1])


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_variance_that_is_not_positive_is_refused(saved, value):
    rewrite_weights(saved[1], lambda tensor: tensor.fill_(value) if tensor.shape == (4, 8) else tensor)
    with pytest.raises(ValueError, match=rf"expected positive numbers in flow\.prior_variance; got {value:g}"):
        TarFlow.from_pretrained(saved[1])


def test_weights_beyond_the_memory_of_the_machine_are_refused(saved, monkeypatch):
    monkeypatch.setattr(hardware, "total_bytes", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"memory: expected the weights of .* all that cpu has; got about "):
        TarFlow.from_pretrained(saved[1])


@pytest.mark.parametrize("kind", [TarFlow, FlowPP])
def test_saving_over_a_model_leaves_nothing_of_its_calibration(tmp_path, kind):
    before = tarflow(dtype=torch.float32)
    before.flow.calibration = [calibration.Timing("cpu", "float32", 1, 0, "jacobi", None, 1, 0.1)]
    before.save_pretrained(tmp_path)
    assert TarFlow.from_pretrained(tmp_path).flow.calibration == tuple(before.flow.calibration)
    after = tarflow(dtype=torch.float32) if kind is TarFlow else FlowPP(FlowPPConfig(filters=4, blocks_per_coupling=1))
    after.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


X, Z, TWO = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), torch.tensor([0, 2])
NO_SIGMAS = (-0.1, math.nan, math.inf, 1e300)
PLAIN, CLASSES, MIXTURE = {}, {"num_classes": 3}, {"num_classes": 3, "coupling": "mixture"}


@pytest.mark.parametrize(
    ("config", "call", "error", "argument"),
    [
        (PLAIN, lambda model: model(X[0]), ValueError, "x"),
        (PLAIN, lambda model: model(X.expand(2, 3, 4, 4)), ValueError, "x"),
        (PLAIN, lambda model: model.log_prob(X[..., :2]), ValueError, "x"),
        (PLAIN, lambda model: model(X.byte()), TypeError, "x"),
        (PLAIN, lambda model: model(X, TWO), ValueError, "labels"),
        (CLASSES, lambda model: model(X), ValueError, "labels"),
        (CLASSES, lambda model: model(X, TWO + 1), ValueError, "labels"),
        (CLASSES, lambda model: model.log_prob(X, TWO.float()), TypeError, "labels"),
        (CLASSES, lambda model: model.denoise(X, 0.1, TWO[:1]), ValueError, "labels"),
        (CLASSES, lambda model: model.inverse(Z, TWO - 2), ValueError, "labels"),
        (CLASSES, lambda model: model.sample(3, TWO), ValueError, "labels"),
        (PLAIN, lambda model: model.sample(2, TWO), ValueError, "labels"),
        (PLAIN, lambda model: model.sample(0), ValueError, "num"),
        (PLAIN, lambda model: model.inverse(Z, decoder="fast"), ValueError, "decoder"),
        (PLAIN, lambda model: model.sample(1, decoder="fast"), ValueError, "decoder"),
        (PLAIN, lambda model: model.sample(1, guidance=Guidance(1.0)), ValueError, "guidance"),
        (CLASSES, lambda model: model.inverse(Z, TWO, Guidance(1.0, drop_label=False)), ValueError, "guidance"),
        (MIXTURE, lambda model: model.sample(1, TWO[:1], Guidance(parameters="mu")), ValueError, "parameters"),
        (PLAIN, lambda model: model.inverse(X), ValueError, "z"),
        (PLAIN, lambda model: model.denoise(X[0], 0.1), ValueError, "y"),
        (PLAIN, lambda model: model.sample(1, chunk_size=0), ValueError, "chunk_size"),
        (PLAIN, lambda model: model(X.numpy()), TypeError, "x"),
        (PLAIN, lambda model: model.inverse(Z.numpy()), TypeError, "z"),
        (PLAIN, lambda model: model.discrete_log_prob(X.byte().numpy()), TypeError, "pixels"),
        (PLAIN, lambda model: model.discrete_log_prob(X), TypeError, "pixels"),
        (PLAIN, lambda model: model.discrete_log_prob(X.byte(), num_samples=1.5), TypeError, "num_samples"),
        (PLAIN, lambda model: model.sample(1.5), TypeError, "num"),
        (PLAIN, lambda model: model.sample("1"), TypeError, "num"),
        (PLAIN, lambda model: model.sample(10**30), ValueError, "memory"),
        (PLAIN, lambda model: model.sample(1, chunk_size=1.5), TypeError, "chunk_size"),
        (CLASSES, lambda model: model.sample(2, TWO, guidance=2.0), TypeError, "guidance"),
        (CLASSES, lambda model: model.inverse(Z, TWO, 2.0), TypeError, "guidance"),
        (CLASSES, lambda model: model(X, TWO.numpy()), TypeError, "labels"),
        (PLAIN, lambda model: model.initialize(X[:0].byte()), ValueError, "pixels"),
        (PLAIN, lambda model: evaluate(model, X[:0].byte(), TWO[:0], 0.0), ValueError, "pixels"),
        *((PLAIN, lambda _, what=what: Guidance(**{what: "x"}), ValueError, what)
          for what in ("weight", "temperature", "drop_label")),
        *((PLAIN, lambda _, wrong=wrong: Decoder("jacobi", **wrong), ValueError, next(iter(wrong)))
          for wrong in ({"window": 1.5}, {"window": "x"}, {"tolerance": "x"})),
        *((PLAIN, lambda _, kind=kind: kind(dequantizer=5), ValueError, "dequantizer")
          for kind in (TarFlowConfig, FlowPPConfig)),
        *((PLAIN, lambda model, sigma=sigma: model.denoise(X, sigma), ValueError, "sigma") for sigma in NO_SIGMAS),
        *((PLAIN, lambda model, sigma=sigma: model.sample(1, denoise_sigma=sigma), ValueError, "denoise_sigma")
          for sigma in NO_SIGMAS),
    ],
)  # fmt: skip
def test_an_error_of_the_model_names_the_argument(config, call, error, argument):
    with pytest.raises(error, match=rf"^{argument}: .*expected .*; got "):
        call(tarflow(dtype=torch.float32, **config))


@pytest.mark.parametrize(
    ("make", "options", "argument"),
    [(TarFlowConfig, {name: value}, name)
     for name in ("image_size", "in_channels", "patch_size", "channels", "num_blocks", "layers_per_block", "head_dim",
                  "expansion") for value in (0, -1, 4.0, "4", None)]
    + [(TarFlowConfig, {"num_blocks": 2, name: value}, name) for name in ("channels", "layers_per_block")
       for value in ([64], (64, 0), (64, 64, 128), (64, 2.0), (64, 10**6))]
    + [(TarFlowConfig, {"num_classes": value}, "num_classes") for value in (-1, 1.5)]
    + [(TarFlowConfig, {"coupling": value}, "coupling") for value in ("spline", None)]
    + [(TarFlowConfig, {"coupling": "mixture", "num_mixtures": value}, "num_mixtures") for value in (0, 65, 2.0)]
    + [(TarFlowConfig, {"coupling": "mixture", "volume_preserving": True}, "volume_preserving")]
    + [(TarFlowConfig, {"image_size": 28, "patch_size": 3}, "patch_size"),
       (TarFlowConfig, {"channels": 96, "head_dim": 64}, "head_dim")]
    + [(Guidance, {"weight": value}, "weight") for value in (-1.0, math.nan, math.inf, 1e300)]
    + [(Guidance, {"temperature": value}, "temperature") for value in (0.0, -1.0, math.nan, math.inf, 1e-300)]
    + [(Guidance, {name: "cosine"}, name) for name in ("schedule", "parameters")],
    ids=str,
)  # fmt: skip
def test_an_error_of_a_setting_names_it(make, options, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*; got "):
        make(**options)


@pytest.mark.parametrize("config", [PLAIN, CLASSES, MIXTURE], ids=str)
def test_a_batch_of_no_images_has_empty_results(config):
    model, labels = tarflow(dtype=torch.float32, **config), TWO[:0] if config else None
    z, logdet = model(X[:0], labels)
    assert (z.shape, logdet.shape) == (Z[:0].shape, (0,))
    assert model.discrete_log_prob(X[:0].byte(), labels, num_samples=2).shape == (0,)
    assert model.denoise(X[:0], 0.1, labels).shape == X[:0].shape
    for decoder in ("sequential", "jacobi"):
        assert model.inverse(z, labels, Guidance(1.0, temperature=0.5), decoder).shape == X[:0].shape


def test_counts_may_be_integers_of_numpy():
    model = tarflow(dtype=torch.float32)
    assert model.sample(np.int64(2), chunk_size=np.int32(1)).shape == (2, 1, 4, 4)
    assert model.discrete_log_prob(X.byte(), num_samples=np.int64(2)).shape == (2,)


@pytest.mark.parametrize("label", [-4, -3, -2, 3, 4, 5])
def test_a_label_that_was_not_looked_at_names_no_other_class(label):
    """Where looking would stall a GPU or is no part of a compiled graph, the embedding itself refuses."""
    transformer = tarflow(num_classes=3).flow.blocks[0].transformer
    with pytest.raises(IndexError):
        transformer.embed_classes(torch.tensor([0, label]))
    embedded = transformer.embed_classes(torch.tensor([-1, 0, 2]))
    assert_close(embedded, torch.cat((transformer.class_embed.mean(0, keepdim=True), transformer.class_embed[[0, 2]])))


@pytest.mark.parametrize("guidance", [Guidance(0.0), Guidance(1.0, temperature=0.5)], ids=str)
def test_guidance_that_an_unconditional_model_can_follow(guidance):
    assert tarflow().sample(2, guidance=guidance).isfinite().all()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("decoding", "Decoded", "BlockStatistics"),
        ("decoding", "Report", "ProgressCallback"),
        ("datasets", "Images", "ImageDataset"),
        ("datasets", "Folder", "ImageFolder"),
        ("evaluation", "bits_per_dim_of_images", "dequantized_bits_per_dim"),
        ("published", "load", "load_published"),
    ],
)
def test_a_name_of_the_last_release_is_found_with_a_warning(module, old, new):
    module = importlib.import_module(f"tarflow.{module}")
    with pytest.warns(DeprecationWarning, match=f"{old}: is now called {new}"):
        assert getattr(module, old) is getattr(module, new)
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(module, "nonsense")  # noqa: B009


def test_methods_and_arguments_of_the_last_release_are_taken_with_a_warning():
    model, pixels = tarflow(), X.byte()
    new = model.importance_log_weights(pixels, num_samples=2, generator=torch.Generator().manual_seed(0))
    with pytest.warns(DeprecationWarning, match="bounds: is now called importance_log_weights"):
        old = model.bounds(pixels, num_samples=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(old, new)
    with pytest.warns(DeprecationWarning, match="draws: is now called num_samples"):
        model.discrete_log_prob(pixels, draws=2)
