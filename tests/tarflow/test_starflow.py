"""A flow over latents that is conditioned on texts: the prefix, the encoders, the dataset and the commands."""

import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from helpers import PREFIX, branches, draw, randomize, tarflow
from tarflow import Guidance, TarFlow, TarFlowConfig, TokenFlow, datasets
from tarflow.cli import main
from tarflow.datasets.latents import read_latents, write_latents
from tarflow.encoders import Autoencoder, TextEncoder
from tarflow.evaluation import noisy_bits_per_dim
from tarflow.model import STARFLOW
from tarflow.pretrained import load_pretrained
from tarflow.training.config import DataConfig, TrainConfig, TrainingConfig
from tarflow.training.presets import PRESETS
from tarflow.training.run import train
from tarflow.transformer import RotaryPositions, rotate

LABELS = torch.tensor([0, -1, 2])
TEXTS = ["", "shirt", "a bag"]


def model(**options):
    return tarflow(**PREFIX | {"num_classes": 3} | options)


# Prefix ---------------------------------------------------------------------------------------------------------------


def test_a_class_is_the_embeddings_that_stand_for_it():
    flow, x = model(), draw(0, 3, 1, 4, 4)
    embeddings = flow.flow.class_prefixes[LABELS + 1]
    assert_close(flow.log_prob(x, LABELS), flow.log_prob(x, embeddings))
    z, guidance = draw(1, 3, 4, 4), Guidance(1.5, "constant", rule="gaussian")
    assert_close(flow.inverse(z, LABELS, guidance), flow.inverse(z, embeddings, guidance))


def test_every_embedding_of_the_prefix_matters_and_so_does_its_place():
    flow, x = model(), draw(0, 1, 1, 4, 4)
    prefix = draw(1, 1, 5, 7)
    plain = flow.log_prob(x, prefix)
    for j in range(5):
        other = prefix.clone()
        other[:, j] += 1
        assert (flow.log_prob(x, other) - plain).abs() > 1e-6
    assert (flow.log_prob(x, prefix.flip(1)) - plain).abs() > 1e-6


def test_the_block_that_is_generated_first_alone_is_guided():
    flow, guidance = model(num_blocks=3).flow, Guidance(2.0)
    guided = [block.guided(guidance, 2 - t) for t, block in enumerate(flow.blocks)]
    assert guided == [None, None, guidance]
    z = draw(0, 3, 4, 4)
    condition, reference = branches(flow, z, LABELS, guidance)
    assert torch.equal(reference.prefix, flow.class_prefixes[:1].expand_as(condition.prefix))
    tempered = Guidance(1.0, temperature=0.5, drop_label=False)
    assert all(block.guided(tempered, 0) for block in flow.blocks), "temperature acts in every block"


def test_a_dropped_label_is_the_text_of_nothing():
    flow, x = model(num_classes=0), draw(0, 2, 1, 4, 4)
    nothing = flow.flow.class_prefixes[:1].expand(2, -1, -1)
    assert_close(flow.log_prob(x), flow.log_prob(x, nothing))


def test_texts_become_the_classes_of_a_model():
    flow, x, texts = model(), draw(0, 4, 1, 4, 4), draw(1, 5, 5, 7)
    flow.set_prefixes(texts)
    assert flow.config.num_classes == 4
    assert_close(flow.log_prob(x, torch.arange(4)), flow.log_prob(x, texts[1:]))
    copy = TarFlow(flow.config).double()
    copy.load_state_dict(flow.state_dict())


@pytest.mark.parametrize("shape", [(5, 7), (0, 5, 7), (2, 4, 7), (2, 5, 8)], ids=str)
def test_prefixes_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"^prefixes: expected shape \(1 \+ num_classes, 5, 7\); got"):
        model().set_prefixes(torch.zeros(shape))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, 5, 8), r"labels: expected embeddings of shape \(3, 5, 7\); got \(3, 5, 8\)"),
        (torch.zeros(2, 5, 7), r"labels: expected embeddings of shape \(3, 5, 7\); got \(2, 5, 7\)"),
        (torch.tensor([0, 1, 3]), "labels: expected int64 .*; got values from 0 to 3"),
        (None, "labels: expected int64 .*; got None"),
    ],
    ids=["size", "batch", "class", "nothing"],
)
def test_labels_that_are_neither_classes_nor_embeddings(labels, message):
    with pytest.raises(ValueError, match=message):
        model().log_prob(draw(0, 3, 1, 4, 4), labels)


# Positions ------------------------------------------------------------------------------------------------------------


def test_rotation_keeps_lengths_and_sees_differences_of_positions_alone():
    q, k = draw(0, 1, 8), draw(1, 1, 8)
    cos_sin = RotaryPositions(9, 8).table(q, 0)
    assert_close(rotate(q, cos_sin[:, 4:5]).norm(), q.norm())
    products = [
        (rotate(q, cos_sin[:, i : i + 1]) * rotate(k, cos_sin[:, j : j + 1])).sum() for i, j in ((4, 0), (8, 4))
    ]
    assert_close(*products, msg="a row and a column apart, wherever")


def test_tokens_of_no_square_stand_in_a_row():
    table = RotaryPositions(5, 8).table(torch.zeros(1), 0)
    rows, columns = table[1].split(2, dim=1)
    assert not rows.any()
    assert_close(columns[:, 0], torch.arange(5.0).sin())


@pytest.mark.parametrize(("head_dim", "length"), [(6, 0), (16, 4), (18, 4)])
def test_a_head_without_such_pairs_is_refused(head_dim, length):
    with pytest.raises(ValueError, match=r"^head_dim: expected a multiple of 4"):
        RotaryPositions(4, head_dim, length)


def test_it_runs_compiled_whole_and_at_low_precision():
    flow = model(num_blocks=2, dtype=torch.float32)
    x = draw(0, 3, 1, 4, 4, dtype=torch.float32)
    expected = flow(x, LABELS)
    flow.compile(fullgraph=True, backend="aot_eager")
    assert_close(flow(x, LABELS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = flow(x, LABELS)
    assert z.dtype == logdet.dtype == torch.float32
    assert_close(z, expected[0], atol=0.1, rtol=0.1)


def test_the_density_given_a_prefix_integrates_to_one():
    flow = randomize(TokenFlow(2, 1, 20, 3, 1, head_dim=20, prefix_length=3, prefix_dim=2, **STARFLOW)).double()
    axis = torch.linspace(-12, 12, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(-1)
    with torch.no_grad():
        total = flow.log_prob(grid, draw(0, 1, 3, 2).expand(len(grid), -1, -1)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total - 1) < 5e-3  # the grid ends at 12


# Latents --------------------------------------------------------------------------------------------------------------

ABOUT = {
    "class_names": ["shirt", "a bag"],
    "source": {"train": "pictures to learn", "test": "pictures to test"},
    "autoencoder": None,
    "text_encoder": None,
    "text_length": None,
}


@pytest.fixture
def latents(tmp_path):
    """Latents of 40 images of two classes, with texts."""
    folder = tmp_path / "latents"
    for split, seed in (("train", 0), ("test", 1)):
        images, labels = draw(seed, 40, 3, 3, 3, dtype=torch.float32), torch.arange(40) % 2
        write_latents(folder, split, images, labels, draw(2, 3, 5, 7, dtype=torch.float32), ABOUT)
    return folder


def test_latents_are_read_as_they_were_written(latents):
    dataset = datasets.load("latents", "test", latents)
    assert torch.equal(dataset.images, draw(1, 40, 3, 3, 3, dtype=torch.float32))
    assert dataset.class_names == ("shirt", "a bag")
    assert dataset.source.startswith("pictures to test")
    assert dataset.prefixes.shape == (3, 5, 7)
    assert datasets.fingerprint(dataset)["digest"] != datasets.fingerprint(read_latents("train", latents))["digest"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "latents.json").unlink(), "data_dir: expected a folder that `tarflow encode` wrote"),
        (
            lambda folder: (folder / "latents.json").write_text("{}"),
            "expected the latents that `tarflow encode` writes",
        ),
        (lambda folder: (folder / "train.safetensors").write_bytes(b"junk"), "expected the latents"),
        (
            lambda folder: (folder / "latents.json").write_text(json.dumps(ABOUT | {"class_names": ["one"]})),
            "expected 2 prefixes, got shape",
        ),
    ],
    ids=["nothing", "no names", "junk", "other classes"],
)
def test_a_folder_that_holds_no_latents(latents, spoil, message):
    spoil(latents)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        datasets.load("latents", "train", latents)


def small(folder, **training):
    config = PRESETS["starflow-fashion-mnist"]
    return TrainConfig(
        replace(config.data, data_dir=folder),
        replace(config.model, channels=64, layers_per_block=1, num_blocks=2),
        replace(config.training, max_steps=2, warmup_steps=1, batch_size=4, calibrate=False, **training),
    )


def test_a_run_on_latents_has_their_texts_and_goes_on_with_them(latents, tmp_path):
    trained = train(small(latents), tmp_path / "run")
    dataset = read_latents("train", latents)
    assert (trained.config.prefix_length, trained.config.prefix_dim, trained.config.num_classes) == (5, 7, 2)
    assert torch.equal(trained.flow.class_prefixes, dataset.prefixes)
    again, metadata = load_pretrained(tmp_path / "run")
    assert torch.equal(again.flow.class_prefixes, dataset.prefixes)
    assert metadata["class_names"] == ["shirt", "a bag"]
    more = replace(small(latents), training=replace(small(latents).training, max_steps=3))
    assert train(more, tmp_path / "run", resume=True) is not None


@pytest.mark.parametrize("levels", [None, (0.1, 0.3)])
def test_a_run_on_latents_is_scored_as_a_density(latents, tmp_path, levels):
    config = small(latents)
    train(replace(config, model=replace(config.model, noise_levels=levels)), tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--num-images=8", "--device=cpu"]) == 0
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["scores"]
    noisy = [name for name in scores if name.startswith("bits/dim of latents with Gaussian noise of sigma")]
    assert len(noisy) == (2 if levels else 1)
    assert not [name for name in scores if "8-bit" in name]
    assert "accuracy of classification by Bayes' rule" in scores


def test_bits_of_latents_are_those_of_their_density():
    model = TarFlow(TarFlowConfig(image_size=4, in_channels=3, channels=64, num_blocks=1))
    latents = draw(0, 256, 3, 4, 4, dtype=torch.float32)
    found = noisy_bits_per_dim(model, latents, sigma=0.5, generator=torch.Generator().manual_seed(0))
    # An untrained model is the identity: its latents are N(0, 1), and these images N(0, 1.25).
    assert found.mean == pytest.approx((math.log(2 * math.pi) + 1.25) / 2 / math.log(2), abs=0.03)


@pytest.mark.parametrize("classes", [{"num_classes": 2}, {}], ids=["conditional", "unconditional"])
def test_latents_are_not_scored_without_the_noise_of_training(latents, tmp_path, capsys, classes):
    model = TarFlow(TarFlowConfig(image_size=3, in_channels=3, patch_size=1, channels=64, num_blocks=1, **classes))
    model.save_pretrained(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), "--dataset=latents", f"--data-dir={latents}", "--device=cpu"]
    assert main(arguments) == 1
    assert "sigma: expected that of training, more than 0, to score latents; got 0" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["samples.npz", "samples.png", "folder"])
def test_latents_are_not_drawn_as_images(tmp_path, monkeypatch, capsys, out):
    TarFlow(TarFlowConfig(image_size=4, in_channels=16, channels=64, num_blocks=1)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(TarFlow, "sample", None)  # nothing is drawn
    assert main(["sample", str(tmp_path / "model"), f"--out={tmp_path / out}"]) == 1
    message = "autoencoder: expected one, which decodes the latents of 16 channels; got none"
    assert message in capsys.readouterr().err


def test_a_model_without_the_embedding_of_any_text_needs_a_prompt(tmp_path, capsys):
    prefix = {"prefix_length": 5, "prefix_dim": 7}
    TarFlow(TarFlowConfig(image_size=4, channels=64, num_blocks=1, **prefix)).save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), f"--out={tmp_path / 'samples.png'}"]) == 1
    assert "prompt: expected texts, since the model has none of its own; got none" in capsys.readouterr().err


def test_there_are_no_statistics_of_latents(latents, capsys):
    arguments = ["statistics", "latents", f"--data-dir={latents}", "--out=statistics.npz"]
    assert main(arguments) == 1
    assert "dataset: expected images, whose features are compared; got latents" in capsys.readouterr().err


def test_latents_have_no_bins_to_fill(latents):
    config = replace(small(latents), training=TrainingConfig(noise="uniform", max_steps=1))
    with pytest.raises(ValueError, match=r"^noise: expected gaussian for latents, which fill no bins; got uniform"):
        config.model_config(replace(read_latents("train", latents), encoders={"autoencoder": "some"}))


def test_without_labels_a_run_on_latents_has_no_prefix(latents):
    config = replace(small(latents), data=DataConfig("latents", latents, conditional=False))
    assert config.model_config(read_latents("train", latents)).prefix_dim == 0


# Encoders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders of a tiny autoencoder and a tiny text encoder over bytes, both with random weights."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes = {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    autoencoder = diffusers.AutoencoderKL(in_channels=1, out_channels=1, scaling_factor=0.5, **blocks, **sizes)
    autoencoder.save_pretrained(folder / "autoencoder")
    config = transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder / "texts")
    transformers.ByT5Tokenizer().save_pretrained(folder / "texts")
    return folder


def test_latents_and_images_are_those_of_the_autoencoder(encoders):
    autoencoder, images = Autoencoder(encoders / "autoencoder"), draw(0, 3, 1, 28, 28, dtype=torch.float32)
    latents = autoencoder.encode(images)
    assert_close(latents, 0.5 * autoencoder.module.encode(images).latent_dist.mean)
    assert_close(autoencoder.decode(latents, chunk_size=2), autoencoder.module.decode(2 * latents).sample)
    assert autoencoder.decode(latents[None, :, None]).shape == (1, 3, 1, 1, 28, 28)
    assert autoencoder.image_shape(latents.shape[1:]) == (1, 28, 28)


def test_an_autoencoder_of_other_channels_is_refused(encoders):
    autoencoder = Autoencoder(encoders / "autoencoder")
    with pytest.raises(ValueError, match=r"autoencoder: expected one for images of 3 channels; .* has 1"):
        autoencoder.encode(torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match=r"autoencoder: expected one for latents of 16 channels; .* has 4"):
        autoencoder.decode(torch.zeros(1, 16, 7, 7))


def test_an_autoencoder_runs_in_its_own_precision(encoders):
    autoencoder, latents = Autoencoder(encoders / "autoencoder"), draw(0, 2, 4, 7, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        images = autoencoder.decode(latents)
        again = autoencoder.encode(images)
    assert torch.equal(images, autoencoder.decode(latents))
    assert torch.equal(again, autoencoder.encode(images))


def test_texts_are_padded_with_zeros_and_cut(encoders):
    encode = TextEncoder(encoders / "texts", length=8)
    embedded = encode(TEXTS)
    assert embedded.shape == (3, 8, 16)
    assert [int(row.any(-1).sum()) for row in embedded] == [1, 6, 6], "bytes and an end"
    assert encode(["a very long text"]).any(-1).all()
    assert_close(encode(["shirt"])[0], embedded[1])


@pytest.mark.parametrize("kind", [Autoencoder, lambda source: TextEncoder(source, 8)], ids=["autoencoder", "text"])
def test_a_folder_without_an_encoder_is_named(kind, tmp_path, encoders):
    with pytest.raises(ValueError, match=r"^(autoencoder|text_encoder): expected .*; got .*nothing"):
        kind(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("library", "kind"), [("diffusers", Autoencoder), ("transformers", lambda source: TextEncoder(source, 8))]
)
def test_a_library_that_is_missing_is_named(monkeypatch, library, kind):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r'reading here needs: pip install "tarflow\[starflow\]"'):
        kind("here")


def test_a_dataset_is_encoded_trained_on_and_sampled_by_prompts(encoders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = {split: datasets.load("fashion-mnist", split) for split in ("train", "test")}
    few = {split: replace(data, images=data.images[:40], labels=data.labels[:40]) for split, data in few.items()}
    read = datasets.load
    load = lambda name, split, *rest: few[split] if name == "fashion-mnist" else read(name, split, *rest)  # noqa: E731
    monkeypatch.setattr(datasets, "load", load)
    flags = f"--autoencoder {encoders / 'autoencoder'} --text-encoder {encoders / 'texts'} --text-length 8"
    assert main(f"encode fashion-mnist latents {flags}".split()) == 0
    trained = train(small(tmp_path / "latents"), tmp_path / "run")
    randomize_weights(trained).save_weights(tmp_path / "run" / "model.safetensors")
    prompts = ["--prompt", "Sneaker", "a bag"]
    assert main(["sample", "run", *prompts, "--num", "4", "--out", "by-prompt.npz", "--sigma", "0"]) == 0
    assert main(["sample", "run", "--labels", "7", "8", "--num", "4", "--out", "by-class.npz", "--sigma", "0"]) == 0
    by_prompt, by_class = (torch.from_numpy(load_images(f"{name}.npz")).int() for name in ("by-prompt", "by-class"))
    assert by_prompt.shape == (4, 28, 28, 1)
    apart = (by_prompt - by_class).abs().amax((1, 2, 3))
    assert apart[0::2].max() <= 3, "but for rounding, the name of a class is the prompt that it was trained by"
    assert apart[1::2].min() > 3
    shutil.copytree(encoders / "autoencoder", "another")
    for autoencoder, status in ((encoders / "autoencoder", 0), ("another", 1)):
        flags = f"--num 2 --sigma 0 --out folder --autoencoder {autoencoder}"
        assert main(["sample", "run", *prompts, *flags.split()]) == status
    assert "autoencoder" in capsys.readouterr().err
    assert main(["sample", "run", *prompts, "--num", "2", "--out", "samples.png", "--trajectory", "way.png"]) == 0
    assert main(["evaluate", "run", "--samples", "40"]) == 1
    assert "statistics: expected those of images" in capsys.readouterr().err


def randomize_weights(flow):
    """Draw the weights of a model as if trained, so that its prefixes, which stay, matter."""
    prefixes = flow.flow.class_prefixes.clone()
    randomize(flow).set_prefixes(prefixes)
    return flow


def load_images(path):
    import numpy as np

    with np.load(path) as arrays:
        return arrays["images"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--labels", "1"], "labels: expected none with --prompt"),
        (["--prompt", "a", "b", "c", "--num", "2"], "prompt: expected at most 2 texts, as --num says; got 3"),
        (["--prompt", "a"], "prompt: expected none for a model that is not conditioned on text"),
    ],
    ids=["labels", "too many", "no text"],
)
def test_prompts_that_have_no_use(tmp_path, capsys, flags, message):
    tarflow(num_classes=2, dtype=torch.float32).save_pretrained(tmp_path / "run")
    assert main(["sample", str(tmp_path / "run"), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_converted_checkpoint_needs_an_encoder_for_prompts(tmp_path, capsys):
    model(dtype=torch.float32).save_pretrained(tmp_path / "run")
    assert main(["sample", str(tmp_path / "run"), "--prompt", "a"]) == 1
    assert "text_encoder: expected the one of training" in capsys.readouterr().err
