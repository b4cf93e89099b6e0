"""The demo computes what the model does: samples, scores and interpolations; its page is tested in a browser."""

import importlib
import math
import re
import sys

import pytest
import torch
from PIL import Image

from helpers import draw as normal
from helpers import tarflow
from tarflow import Decoder, Denoising, FlowPP, FlowPPConfig, Guidance, cli, evaluation, load_pretrained, noise
from tarflow.demo.tasks import Settings, Trained, draw, interpolate, read, score, slerp, to_model

SEQUENTIAL = Decoder("sequential")


def trained(sigma=0.1, **config):
    return Trained(
        tarflow(**config).eval(), {"sigma": sigma, "denoising_steps": None, "class_names": ["shirt"]}, "small"
    )


def pixels(num=1, channels=1, seed=0):
    return torch.randint(256, (num, channels, 4, 4), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, Settings(3, decoder=SEQUENTIAL, seed=1)),
        ({}, Settings(2, guidance=Guidance(1.0, temperature=0.5), denoising_steps=1)),
        ({"num_classes": 3}, Settings(4, guidance=Guidance(2.0), decoder=Decoder("jacobi"), denoising_steps=2)),
        ({"num_classes": 3}, Settings(2, label=1, guidance=Guidance(1.0, "constant"))),
        ({"num_classes": 3}, Settings(2, label=-1)),
        ({"noise_levels": (0.05, 0.1), "num_classes": 2}, Settings(2, denoising_steps=3)),
    ],
)
def test_the_last_stage_is_the_sample_of_the_model(config, settings):
    flow = trained(**config)
    *before, last = draw(flow, settings)
    sampled = flow.model.sample(
        settings.num,
        flow.labels(settings.num, settings.label),
        settings.guidance,
        flow.sigma if settings.denoising_steps else 0.0,
        settings.decoder,
        torch.Generator().manual_seed(settings.seed),
        denoising=Denoising(settings.denoising_steps or None),
    )
    assert torch.equal(last.images, sampled)
    assert [stage.name for stage in before][:4] == ["latent", *flow.model.stages][: len(before)]


def test_stages_tell_what_they_cost_so_far():
    stages = list(draw(trained(), Settings(2, decoder=SEQUENTIAL, denoising_steps=1)))
    assert [stage.passes for stage in stages] == [stage.steps for stage in stages] == [0, 3, 6, 9, 9]
    seconds = [stage.seconds for stage in stages]
    assert seconds == sorted(seconds)


def test_stages_are_shown_as_they_are_decoded():
    stages = draw(trained(num_classes=3), Settings(2, guidance=Guidance(1.0)))
    assert next(stages).name == "latent"
    assert next(stages).name == "after block 3"


def test_a_guidance_that_can_have_no_effect_is_refused_by_the_model():
    with pytest.raises(ValueError, match="guidance: the reference branch equals the conditional one"):
        list(draw(trained(), Settings(2, guidance=Guidance(1.0))))


def test_labels_are_the_classes_in_turn_or_all_of_one():
    flow = trained(num_classes=3)
    assert flow.labels(4, None).tolist() == [0, 1, 2, 0]
    assert flow.labels(2, -1).tolist() == [-1, -1]
    assert flow.class_names == ["shirt", "class 1", "class 2"]
    assert trained().labels(2, None) is None


SQUARE = "8 x 8 pixels"


@pytest.mark.parametrize(
    ("image", "channels", "invert", "value", "done"),
    [
        (Image.new("L", (4, 4), 10), 1, True, 10, "4 x 4 pixels"),
        (Image.new("L", (8, 8), 10), 1, True, 10, f"{SQUARE}, resized to 4 x 4 (Lanczos)"),
        (Image.new("L", (8, 4), 10), 1, True, 10, "8 x 4 pixels, cropped to its centre"),
        (Image.new("RGB", (4, 4), "white"), 1, False, 255, "4 x 4 pixels, converted to grey"),
        (
            Image.new("RGB", (4, 4), "white"),
            1,
            True,
            0,
            "4 x 4 pixels, converted to grey, inverted, since its border is light",
        ),
        (Image.new("RGBA", (4, 4)), 3, True, 255, "4 x 4 pixels, converted to RGB"),
    ],
)
def test_an_image_becomes_one_of_the_model_and_what_was_done_is_said(image, channels, invert, value, done):
    converted, said = to_model(image, (channels, 4, 4), invert)
    assert torch.equal(converted, torch.full((1, channels, 4, 4), value, dtype=torch.uint8))
    assert said == done


def test_a_file_is_read_or_refused_by_its_name(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    image, _ = read(tmp_path / "grey.png", (1, 4, 4), invert=True)
    assert image.unique().tolist() == [7]
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"^text\.png: expected an image, but reading it fails"):
        read(tmp_path / "text.png", (1, 4, 4), invert=True)


@pytest.mark.parametrize("sigma", [0.1, 0.0])
def test_bits_per_dim_are_those_of_the_evaluation(sigma):
    flow, num = trained(sigma), 5
    found = score(flow, pixels(), num, seed=3)
    generator, repeated = torch.Generator().manual_seed(3), pixels().expand(num, -1, -1, -1)
    if sigma:
        expected = evaluation.noisy_bits_per_dim(flow.model, repeated, sigma=sigma, generator=generator)
    else:
        expected = evaluation.bits_per_dim(flow.model, repeated, generator=generator)
    assert found.bits_per_dim.mean == pytest.approx(expected.mean)
    assert found.bits_per_dim.standard_error == pytest.approx(expected.standard_error)
    assert found.posterior is None


def test_classes_are_averaged_over_and_weighed_by_bayes_rule():
    flow, num = trained(num_classes=3), 4
    found = score(flow, pixels(), num, seed=3)
    x = noise.add_gaussian_noise(pixels().expand(num, -1, -1, -1), 0.1, torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        likelihoods = torch.stack([flow.model.log_prob(x, torch.full((num,), k)).exp() for k in range(3)], dim=1)
    assert torch.allclose(found.posterior, (likelihoods / likelihoods.sum(1, keepdim=True)).mean(0))
    bits = -(likelihoods.mean(1).log() / 16 - math.log(128)) / math.log(2)
    assert found.bits_per_dim.mean == pytest.approx(bits.mean().item())


@pytest.mark.parametrize(
    ("sigma", "config"),
    [
        (0.0, {}),
        (0.1, {}),
        (0.0, {"num_classes": 3}),
        (0.1, {"num_classes": 3}),
        (0.1, {"noise_levels": (0.05, 0.1)}),
        (0.1, {"in_channels": 3}),
    ],
)
def test_an_image_comes_back_from_its_latents(sigma, config):
    image = pixels(channels=config.get("in_channels", 1))
    found = score(trained(sigma, **config), image, 2)
    assert found.same_bytes
    assert found.largest_error < 1e-10
    assert torch.equal(noise.to_pixels(found.reconstruction, noise.quantization(sigma)), image)


def test_an_interpolation_leads_from_one_image_to_the_other():
    first, second = pixels(2).split(1)
    images = interpolate(trained(sigma=0.0, num_classes=3), first, second, num=5)
    assert images.shape == (5, 1, 4, 4)
    assert torch.equal(noise.to_pixels(images[[0, -1]], "floor"), torch.cat((first, second)))


def test_an_interpolation_of_noisy_images_is_denoised():
    flow, (first, second) = trained(num_classes=3), pixels(2).split(1)
    ends = interpolate(flow, first, second, num=3, seed=2)[[0, -1]]
    noisy = noise.add_gaussian_noise(torch.cat((first, second)), 0.1, torch.Generator().manual_seed(2)).double()
    assert torch.allclose(ends, flow.model.denoise(noisy, 0.1, torch.tensor([-1, -1])))


def test_an_arc_turns_evenly_and_keeps_its_distance():
    a, b = (v / v.norm() for v in normal(0, 2, 3, 4).unbind())
    points = slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64)).flatten(1)
    assert torch.allclose(points.norm(dim=1), torch.ones(5, dtype=torch.float64))
    angles = (points[1:] * points[:-1]).sum(1).acos()
    assert torch.allclose(angles, (a * b).sum().acos() / 4)
    assert torch.allclose(slerp(a, a, torch.tensor([0.3], dtype=torch.float64)), a)


def test_the_model_that_ships_is_small_and_knows_its_test_images():
    demo = importlib.import_module("tarflow.cli.demo")
    model, metadata = load_pretrained(demo.SHIPPED)
    assert (demo.SHIPPED / "model.safetensors").stat().st_size < 2e6
    test_images = demo.load_test_images(demo.SHIPPED)
    images, labels = test_images.get_batch(torch.arange(100))
    generator = torch.Generator().manual_seed(0)
    assert evaluation.noisy_bits_per_dim(model, images, labels, metadata["sigma"], generator=generator).mean < 6.5
    assert evaluation.accuracy(model, images, labels, metadata["sigma"], generator=generator).mean > 0.65


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "source: expected a folder"),
        (["--port=0"], "port: expected an integer from 1 to 65535; got 0"),
        (["{flowpp}"], "run: expected a TarFlow; .* holds a FlowPP"),
        (["{latents}"], "run: expected a model of grey or RGB images; got 4 channels"),
        (["{tarflow}"], r"demo: the page needs gradio: pip install \"tarflow\[demo\]\""),
    ],
)
def test_what_is_missing_is_said_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "tarflow.demo.page", raising=False)
    tarflow().save_pretrained(tmp_path / "tarflow")
    tarflow(in_channels=4).save_pretrained(tmp_path / "latents")
    small = FlowPPConfig(image_size=4, in_channels=1, stack="squeeze channel1", filters=8, blocks_per_coupling=1)
    FlowPP(small).save_pretrained(tmp_path / "flowpp")
    folders = {name: tmp_path / name for name in ("tarflow", "latents", "flowpp")}
    assert cli.main(["demo", *(argument.format(**folders) for argument in arguments)]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(f"^tarflow demo: error: {message}", line)
