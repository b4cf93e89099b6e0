"""Samples are drawn as their protocol says, none that is not finite is scored, and statistics are those of the data."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tarflow import datasets
from tarflow.datasets import ImageDataset
from tarflow.features import Extractor, load_classifier
from tarflow.reference import Reference
from tarflow.samples import Sampler, distance_range, draw_labels, score_samples
from tarflow.scores import FeatureSums, frechet_distance

SIDE = 4


def quadrants(pixels):
    """Features that one can compute by hand: the mean of each quarter of an image, and what classes are told by."""
    return torch.nn.functional.avg_pool2d(pixels / 255, SIDE // 2).flatten(1)


EXTRACTOR = Extractor(
    features=quadrants,
    classify=lambda features: (features.mean(1) > 0.5).long(),
    name="quadrants",
    frechet_name="distance",
    kernel_name="kernel distance",
    resize="none",
    digest="0123456789",
    device=torch.device("cpu"),
)


def images(num, seed=0, least=0, most=256):
    return torch.randint(
        least, most, (num, 1, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def dataset(pixels):
    return ImageDataset(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("thing",), True, "random images")


def batches(pixels, labels=None, size=16):
    parts = [None] * len(pixels) if labels is None else labels.split(size)
    return list(zip(pixels.split(size), parts, strict=False))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_reference_statistics_are_those_of_all_images(batch_size):
    pixels = images(40)
    reference = Reference.of(dataset(pixels), EXTRACTOR, flip=False, batch_size=batch_size)
    expected = quadrants(pixels).double()
    torch.testing.assert_close(reference.sums.mean, expected.mean(0))
    torch.testing.assert_close(reference.sums.covariance, expected.T.cov())
    assert sorted(reference.features.sum(1).tolist()) == pytest.approx(sorted(expected.sum(1).tolist()))
    assert (reference.about["images"], reference.about["transform"]) == (40, "none")


def test_about_half_of_the_images_are_mirrored_where_they_are_in_training():
    pixels = torch.zeros(400, 1, SIDE, SIDE, dtype=torch.uint8)
    pixels[..., : SIDE // 2] = 255
    reference = Reference.of(dataset(pixels), EXTRACTOR, flip=True)
    left, right, *_ = reference.sums.total.tolist()
    assert 160 < left < 240
    assert left + right == 400
    assert reference.about["transform"].startswith("mirrored")


def test_statistics_are_read_as_they_were_written(tmp_path):
    reference = Reference.of(dataset(images(40)), EXTRACTOR, flip=True)
    reference.save(tmp_path / "statistics.safetensors")
    again = Reference.load(tmp_path / "statistics.safetensors", EXTRACTOR)
    assert again.about == reference.about
    assert all(map(torch.equal, (*again.sums, again.features), (*reference.sums, reference.features)))


def test_statistics_of_another_extractor_are_refused(tmp_path):
    Reference.of(dataset(images(40)), EXTRACTOR, flip=False).save(tmp_path / "s")
    other = replace(EXTRACTOR, name="another", digest="ab" * 32)
    with pytest.raises(ValueError, match=r"statistics: expected those of another \(weights abababab\); got .* of quad"):
        Reference.load(tmp_path / "s", other)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("outer"),
        lambda tensors: tensors.update(total=torch.zeros(5, dtype=torch.float64)),
        lambda tensors: tensors.update(num=torch.tensor(4.0, dtype=torch.float64)),
        lambda tensors: tensors.update(features=tensors["features"].double()),
        lambda tensors: tensors.update(features=tensors["features"][0]),
        lambda tensors: tensors["features"].fill_(torch.nan),
    ],
    ids=["no outer", "another size", "too few", "another dtype", "another shape", "nan"],
)
def test_damaged_statistics_are_refused(tmp_path, change):
    path = tmp_path / "statistics.safetensors"
    reference = Reference.of(dataset(images(40)), EXTRACTOR, flip=False)
    reference.save(path)
    tensors, about = load_file(path), re.search(rb'"about":"(.*?)"\}', path.read_bytes())[1]
    change(tensors)
    save_file(tensors, path, {"about": about.decode().replace('\\"', '"')})
    with pytest.raises(ValueError, match="statistics: expected a file that tarflow statistics wrote; got "):
        Reference.load(path, EXTRACTOR)


def test_too_few_images_are_no_reference():
    with pytest.raises(ValueError, match="dataset: expected at least 8 images; got 7"):
        Reference.of(dataset(images(7)), EXTRACTOR, flip=False)


def test_labels_are_in_turn_or_drawn_uniformly():
    assert draw_labels("balanced", 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = draw_labels("tarflow", 3000, 3, seed=1)
    assert drawn.equal(draw_labels("tarflow", 3000, 3, seed=1))
    assert not drawn.equal(draw_labels("tarflow", 3000, 3, seed=2))
    assert ((drawn.bincount() - 1000).abs() < 4 * (3000 * 2 / 9) ** 0.5).all()
    assert draw_labels("tarflow", 7, 0) is draw_labels("balanced", 7, 0) is None


class Draw:
    """Samples each of which is the number of its label; the first draws of some labels are not finite."""

    def __init__(self, bad_draws):
        self.bad_draws = bad_draws

    def __call__(self, num, labels):
        images = (labels / 10).float().view(-1, 1, 1, 1).repeat(1, 1, SIDE, SIDE)
        assert len(images) == num
        for image, label in zip(images, labels.tolist(), strict=True):
            if self.bad_draws.get(label, 0):
                self.bad_draws[label] -= 1
                image[0, 0, 0] = torch.inf
        return images


@pytest.mark.parametrize(("quantization", "pixel"), [("truncate", 165), ("round", 166)])
def test_samples_that_are_not_finite_are_counted_and_others_drawn_in_their_place(quantization, pixel):
    sampler = Sampler(Draw({3: 1, 5: 10}), quantization, torch.Generator())
    drawn = list(sampler.batches(8, torch.arange(8), batch_size=3))
    assert [len(pixels) for pixels, _ in drawn] == [3, 3, 2]
    assert torch.cat([labels for _, labels in drawn]).tolist() == [*range(8)]
    pixels = torch.cat([pixels for pixels, _ in drawn])
    assert sampler.not_finite == 11
    assert pixels[3].unique().tolist() == [pixel]  # (0.3 + 1) 127.5 = 165.75
    assert (pixels.flatten(1).diff(dim=1) == 0).all()


def test_a_sample_that_is_never_finite_ends_the_scores():
    with pytest.raises(ValueError, match="1 of 4 samples are not finite after being drawn anew 10 times"):
        list(Sampler(Draw({1: 99}), "round", torch.Generator()).batches(4, torch.arange(4), batch_size=4))


def test_the_distance_of_samples_is_that_of_their_features():
    real, drawn = images(50), images(30, seed=1, least=100)
    reference = Reference.of(dataset(real), EXTRACTOR, flip=False)
    scores = score_samples(batches(drawn), EXTRACTOR, reference)
    expected = frechet_distance(*(FeatureSums.of(quadrants(pixels)) for pixels in (drawn, real)))
    assert scores["distance"] == pytest.approx(expected)
    assert "recognised as their class" not in scores


def test_samples_are_recognised_by_the_classifier():
    dark, light = images(20, most=100), images(20, least=200)
    labels = torch.tensor(20 * [0] + 15 * [1] + 5 * [0])
    reference = Reference.of(dataset(images(50)), EXTRACTOR, flip=False)
    scores = score_samples(batches(torch.cat((dark, light)), labels), EXTRACTOR, reference)
    assert scores["recognised as their class"] == pytest.approx(35 / 40)
    unknown = score_samples(batches(dark, labels[:20]), replace(EXTRACTOR, classify=None), reference)
    assert "recognised as their class" not in unknown


def test_real_images_score_between_floor_and_ceiling_and_noise_at_the_ceiling():
    reference = Reference.of(dataset(images(1000, most=100)), EXTRACTOR, flip=False)
    floor, ceiling = distance_range(500, (1, SIDE, SIDE), EXTRACTOR, reference).values()
    real, noise, between = (
        score_samples(batches(images(500, 1, most=most)), EXTRACTOR, reference)["distance"] for most in (100, 256, 150)
    )
    assert max(floor, real) < between / 10 < min(ceiling, noise) / 20
    assert noise == pytest.approx(ceiling, rel=0.1)


@pytest.mark.parametrize(("num", "used"), [(30, 30), (300, 200)])
def test_floor_and_ceiling_are_of_as_many_images_or_of_as_many_as_there_are(num, used):
    reference = Reference.of(dataset(images(400)), EXTRACTOR, flip=False)
    names = distance_range(num, (1, SIDE, SIDE), EXTRACTOR, reference)
    assert [f" {used} " in name for name in names] == [True, True]


def test_what_is_drawn_for_scores_is_repeated_by_the_seed():
    reference = Reference.of(dataset(images(400)), EXTRACTOR, flip=False)
    one, same, other = (score_samples(batches(images(100)), EXTRACTOR, reference, seed) for seed in (0, 0, 1))
    assert one == same != other


def test_the_classifier_tells_the_images_that_ship_from_noise():
    """The offline default, from end to end."""
    data, extractor = datasets.load("fashion-mnist", "test"), load_classifier(torch.device("cpu"))
    pixels, labels = data.get_batch(torch.arange(400))
    half = ImageDataset(data.images[400:], data.labels[400:], data.class_names, data.flip, data.source)
    reference = Reference.of(half, extractor, flip=False)
    scores = score_samples(batches(pixels, labels, 100), extractor, reference)
    floor, ceiling = distance_range(400, (1, 28, 28), extractor, reference).values()
    assert scores["Frechet distance in classifier features"] < 2 * floor < ceiling / 10
    assert scores["recognised as their class"] > 0.85
