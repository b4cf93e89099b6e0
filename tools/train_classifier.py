"""Train the classifier of Fashion-MNIST in whose features samples are compared offline.

    python tools/train_classifier.py [folder of the four IDX files]

It never sees the test split, nor the 1,000 test images of the subset that ships with tarflow, which are of the training
split: 59,000 images are left. Without the full data it trains on the 10,000 images of that subset. It runs on one
thread, so that the seed repeats it. The accuracy on the test images, and what it was trained on, stand in the metadata
of the weights.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tarflow import datasets
from tarflow.datasets.readers import SHIPPED_SUBSET
from tarflow.features import CLASSIFIER, Classifier

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, SEED = 16, 128, 4e-3, 0.02, 0
SHIFT, HOLE = 2, 8


def main(data_dir: Path | None = None) -> None:
    """Train, test and write the classifier."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    train, test = (datasets.load("fashion-mnist", split, data_dir) for split in ("train", "test"))
    images, labels = train.images, train.labels
    if len(train) == 60_000:
        seen = np.setdiff1d(np.arange(len(train)), np.load(SHIPPED_SUBSET)["test_indices"])
        images, labels = images[seen], labels[seen]
    model = Classifier(train.num_classes)
    optimize(model, images, labels)
    model.eval()
    standardize(model, images)
    accuracy = (predict(model, test.images) == test.labels).double().mean().item()
    metadata = {
        "train": f"{len(images):,} images of the training split of Fashion-MNIST",
        "test": test.source.partition(" from /")[0],
        "test_accuracy": f"{accuracy:.4f}",
        "recipe": f"{EPOCHS} epochs of batch {BATCH_SIZE}, AdamW at {LEARNING_RATE:g}, mirrored, shifted by {SHIFT} "
        f"pixels, with holes of {HOLE} pixels, seed {SEED}",
    }
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, CLASSIFIER, metadata)
    print(f"{CLASSIFIER.name}: {metadata}, {CLASSIFIER.stat().st_size:,} bytes")


def optimize(model: Classifier, images: Tensor, labels: Tensor) -> None:
    """Minimize the cross-entropy of augmented images, with a learning rate that rises and falls once."""
    steps = len(images) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(images))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(model(augment(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {total / steps:.4f}", flush=True)


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images, shift each by a few pixels, and black out a square in it."""
    size, side = len(images), images.shape[-1]
    rows, columns = (torch.arange(side) + torch.randint(0, 2 * SHIFT + 1, (2, size, 1))).unbind()
    columns = torch.where(torch.rand(size, 1) < 0.5, columns, columns.flip(1))
    padded = F.pad(images, 4 * [SHIFT])[:, 0]
    shifted = padded[torch.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]
    down, across = (
        ((torch.arange(side) - start).abs() < HOLE / 2) for start in torch.randint(0, side, (2, size, 1)).unbind()
    )
    return (shifted * ~(down[:, :, None] & across[:, None, :]))[:, None]


@torch.no_grad()
def standardize(model: Classifier, images: Tensor) -> None:
    """Set the mean and the variance of the features by all images as they are; the head makes up for it."""
    features = torch.cat([model.features(part) for part in images.split(500)]).double()
    mean, deviation = features.mean(0), features.std(0)
    scale = (model.standardize.running_var + model.standardize.eps).sqrt()
    model.head.bias += model.head.weight @ mean.float()
    model.head.weight *= deviation.float()
    model.standardize.running_mean += scale * mean
    model.standardize.running_var.copy_((scale * deviation).square() - model.standardize.eps)


@torch.no_grad()
def predict(model: Classifier, images: Tensor) -> Tensor:
    """Return the classes that the classifier finds, ``(N,)``."""
    return torch.cat([model(part).argmax(1) for part in images.split(500)])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
