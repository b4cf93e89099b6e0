"""A tiny STARFlow from nothing: an autoencoder, a text encoder, latents, training, and whether samples follow a prompt.

    python studies/starflow.py [--out runs/starflow] [--steps N]

An ``AutoencoderKL`` of diffusers is trained on the Fashion-MNIST that ships with tarflow, for a few minutes on a CPU.
The text encoder is a small T5 of transformers with random weights over bytes, which needs no files: it is enough to
tell texts apart. Then `tarflow encode`, `train` and `sample --prompt` run as a user would run them. Prompts are the
names of the classes, and the classifier that ships with tarflow tells how often a sample is one of its prompt.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tarflow import Guidance, datasets
from tarflow.cli import main as tarflow
from tarflow.encoders import Autoencoder
from tarflow.features import load_classifier
from tarflow.files import atomic_write
from tarflow.noise import to_pixels
from tarflow.pretrained import load_pretrained
from tarflow.reference import Reference
from tarflow.samples import score_samples

RESULT = Path(__file__).with_name("results") / "starflow" / "scores.json"
TEXT_LENGTH = 12  # bytes of the longest name of a class, and the end


def main(arguments: list[str] | None = None) -> None:
    """Train all parts, as far as they are not there, draw samples and score them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/starflow"), help="folder of all parts")
    parser.add_argument("--autoencoder-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2000, help="updates of the flow")
    parser.add_argument("--samples", type=int, default=1000)
    command = parser.parse_args(arguments)
    out, encoder, texts = command.out, command.out / "autoencoder", command.out / "text-encoder"
    began = time.perf_counter()
    if not encoder.exists():
        train_autoencoder(command.autoencoder_steps).save_pretrained(encoder)
    if not texts.exists():
        save_text_encoder(texts)
    if not (out / "latents" / "test.safetensors").exists():
        flags = f"--autoencoder {encoder} --text-encoder {texts} --text-length {TEXT_LENGTH}"
        run(f"encode fashion-mnist {out / 'latents'} {flags}")
    if not (out / "run" / "trajectory.png").exists():
        flags = f"--preset starflow-fashion-mnist --data-dir {out / 'latents'} --max-steps {command.steps}"
        run(f"train {flags} --out {out / 'run'}")
    seconds = time.perf_counter() - began
    named = ["--prompt", *datasets.load().class_names]
    drawn = ["--guidance", "2.5", "--schedule", "constant", "--rule", "gaussian", "--out", str(out / "samples.png")]
    if status := tarflow(["sample", str(out / "run"), *named, *drawn]):
        raise SystemExit(status)
    result = {"minutes": seconds / 60, "steps": command.steps, "autoencoder_steps": command.autoencoder_steps}
    result["weights"] = {f"{w:g}": score(out / "run", command.samples, w) for w in (0.0, 2.5)}
    result["reconstructions"] = score_reconstructions(encoder)
    RESULT.parent.mkdir(exist_ok=True)
    with atomic_write(RESULT) as beside:
        beside.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def run(command: str) -> None:
    """Run a command of tarflow."""
    if status := tarflow(command.split()):
        raise SystemExit(status)


def train_autoencoder(steps: int, seed: int = 0) -> AutoencoderKL:
    """Train an autoencoder of 28 x 28 images to latents of 4 x 7 x 7, by squared error and a little of the KL."""
    torch.manual_seed(seed)
    module = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 32],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    images = datasets.load().images.float() / 127.5 - 1
    for step in range(steps):
        x = images[torch.randint(len(images), (64,))]
        posterior = module.encode(x).latent_dist
        reconstructed = module.decode(posterior.sample()).sample
        loss = F.mse_loss(reconstructed, x) + 1e-6 * posterior.kl().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"autoencoder, step {step}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        latents = torch.cat([module.encode(part).latent_dist.mode() for part in images[:1000].split(100)])
    module.register_to_config(scaling_factor=1 / latents.std().item())
    return module


def save_text_encoder(folder: Path, seed: int = 0) -> None:
    """Write a small T5 over bytes, with random weights, and its tokenizer."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def score(folder: Path, num: int, weight: float) -> dict[str, float | None]:
    """Draw samples, prompts in turn, and compare them with the training images."""
    model, metadata = load_pretrained(folder)
    autoencoder = Autoencoder.of(metadata, "cpu")
    assert autoencoder is not None
    guidance = Guidance(weight, "constant", rule="gaussian") if weight else None
    labels = torch.arange(num) % model.config.num_classes
    generator = torch.Generator().manual_seed(0)
    drawn = model.sample(num, labels, guidance, metadata["sigma"], generator=generator)
    assert isinstance(drawn, Tensor)
    return compare(autoencoder.decode(drawn), labels)


def score_reconstructions(folder: Path) -> dict[str, float | None]:
    """Compare the reconstructions of test images with the training images: the best that a flow can do."""
    autoencoder, test = Autoencoder(folder), datasets.load(split="test")
    pixels, labels = test.get_batch(datasets.evenly_spaced(len(test), 1000))
    return compare(autoencoder.decode(autoencoder.encode(pixels / 127.5 - 1)), labels)


def compare(images: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Return the Frechet distance, and how often an image is recognised as its class."""
    extractor, train_set = load_classifier(torch.device("cpu")), datasets.load()
    reference = Reference.of(train_set, extractor, train_set.flip)
    scores = score_samples([(to_pixels(images, "round"), labels)], extractor, reference)
    return {name: value for name, value in scores.items() if name.startswith(("Frechet", "recognised"))}


if __name__ == "__main__":
    main()
