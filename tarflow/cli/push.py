"""``tarflow push``: publish a trained model on the Hugging Face hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from .. import hub
from .parsing import parse
from .shared import check_writable, load_model

__all__ = ["Push", "run"]


@dataclass(frozen=True)
class Push:
    """Publish a trained model on the Hugging Face hub, with its samples, its scores and a card that tells of them."""

    run: tyro.conf.Positional[Path]
    """folder of a run or of a saved model"""
    repository: tyro.conf.Positional[str]
    """owner/name, which is made where there is none"""
    license: str | None = None
    """license of the model, such as mit, for its card; that of the card before, where the folder has one"""
    private: bool = False
    """whether a repository that is made is private"""


def run(arguments: Sequence[str]) -> None:
    """Publish a model; print where it is."""
    command, _ = parse(Push, arguments)
    check_writable("run", command.run)
    model, _ = load_model(command.run, "cpu")
    address = hub.push(model, command.run, command.repository, license=command.license, private=command.private or None)
    print(f"published {address}")
