"""Features are those of the network that is named: of the classifier that ships, and of torch-fidelity's Inception."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from tarflow import datasets, features
from tarflow.datasets.readers import SHIPPED_SUBSET
from tarflow.features import CLASSIFIER, load_classifier, load_extractor, load_inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def test_images():
    """The 1,000 test images that ship, which the classifier was not trained on."""
    return datasets.load("fashion-mnist", "test", SHIPPED_SUBSET)


def test_the_classifier_knows_unseen_images_as_well_as_its_metadata_say(test_images):
    with safe_open(CLASSIFIER, "pt") as file:
        stated = float(file.metadata()["test_accuracy"])
    classifier = load_classifier(CPU)
    found = classifier.classify(classifier(test_images.images))
    accuracy = (found == test_images.labels).double().mean().item()
    error = (stated * (1 - stated) / len(found)) ** 0.5
    assert stated > 0.905
    assert accuracy == pytest.approx(stated, abs=3 * error)


def test_the_features_of_the_classifier_are_standardized(test_images):
    found = load_classifier(CPU)(test_images.images)
    assert (found.shape, found.dtype) == ((1000, 96), torch.float32)
    torch.testing.assert_close(found.mean(0), torch.zeros(96), atol=0.15, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(96), atol=0.25, rtol=0)


def test_features_do_not_depend_on_batches_nor_on_autocast(test_images):
    classifier, images = load_classifier(CPU), test_images.images[:50]
    with torch.autocast("cpu", torch.bfloat16):
        parts = torch.cat([classifier(part) for part in images.split(7)])
    torch.testing.assert_close(parts, classifier(images), atol=1e-5, rtol=1e-5)


def test_the_weights_that_ship_are_small():
    assert CLASSIFIER.stat().st_size < 2**20


class StandIn(torch.nn.Linear):
    """A network with the interface of torch-fidelity's Inception, which unpickles whatever it is given."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__(3, 4)
        assert features_list == ["2048"]
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, pixels):
        assert (pixels.dtype, pixels.shape[1]) == (torch.uint8, 3)
        return (super().forward(pixels.float().mean((2, 3))),)


@pytest.fixture
def fidelity(monkeypatch):
    """A library in place of torch-fidelity, which needs a torchvision that fits torch."""
    library, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    library.__version__, module.FeatureExtractorInceptionV3 = "0.4", StandIn
    for part in (library, module):
        monkeypatch.setitem(sys.modules, part.__name__, part)


def publish(monkeypatch, path: Path, state) -> Path:
    """Write weights that pass for the published ones."""
    torch.save(state, path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_is_that_of_torch_fidelity_with_the_weights_of_the_file(fidelity, monkeypatch, tmp_path, channels):
    weights = torch.nn.Linear(3, 4)
    path = publish(monkeypatch, tmp_path / "inception.pth", weights.state_dict())
    pixels = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    extractor = load_extractor(path, ["cat", "dog"], CPU)
    expected = weights(pixels.expand(-1, 3, -1, -1).float().mean((2, 3))).detach()
    torch.testing.assert_close(extractor(pixels), expected)
    assert (extractor.classify, extractor.digest) == (None, features.INCEPTION_SHA256)
    assert "antialias" in extractor.resize


class Harm:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("code of the file was run",)


def test_no_code_in_weights_is_run_though_their_checksum_be_right(fidelity, monkeypatch, tmp_path):
    path = publish(monkeypatch, tmp_path / "inception.pth", {"weight": Harm()})
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_inception(path, CPU)


def test_weights_that_are_not_the_published_ones_are_refused_with_their_source(tmp_path):
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"weights: expected .* https://.*6726825d\.pth, of SHA-256 6726825d.*; got "):
        load_inception(tmp_path / "other.pth", CPU)
    with pytest.raises(FileNotFoundError, match=r"weights: expected .* https://.*; there is no file .*none\.pth"):
        load_inception(tmp_path / "none.pth", CPU)


def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    path = publish(monkeypatch, tmp_path / "inception.pth", {})
    with pytest.raises(ImportError, match=r'weights: expected torch-fidelity \(pip install "tarflow\[fid\]"\)'):
        load_inception(path, CPU)


def test_the_classifier_serves_fashion_mnist_alone(test_images):
    assert load_extractor(None, test_images.class_names, CPU).classify is not None
    with pytest.raises(ValueError, match=r"weights: expected a file for images other than Fashion-MNIST: .* https://"):
        load_extractor(None, tuple("0123456789"), CPU)
