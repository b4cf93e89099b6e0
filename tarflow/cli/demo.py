"""``tarflow demo``: a page in the browser to sample from a model, score images and interpolate between them."""

import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from .. import datasets
from ..datasets import ImageDataset, ImageFolder
from ..demo.tasks import Trained
from ..model import TarFlow
from ..training.folder import read_run
from .parsing import parse
from .shared import load_model

__all__ = ["SHIPPED", "Demo", "load_test_images", "run"]

SHIPPED = Path(__file__).parents[1] / "data" / "fashion-mnist"
"""The trained model that comes with tarflow."""


@dataclass(frozen=True)
class Demo:
    """Serve a page to play with a trained TarFlow: samples as they are decoded, scores of images, interpolation."""

    run: tyro.conf.Positional[Path] = SHIPPED
    """folder of a run or of a saved model, or the name of one on the Hugging Face hub; by default a small model of
    Fashion-MNIST that comes with tarflow"""
    host: str = "127.0.0.1"
    """address that the page is served at; others than this machine's reach it at 0.0.0.0"""
    port: int = 7860
    device: str = "auto"


def run(arguments: Sequence[str]) -> None:
    """Serve the page until Ctrl-C; what is uploaded lies in a temporary folder that is deleted then."""
    command, _ = parse(Demo, arguments)
    if not 1 <= command.port <= 65535:
        raise ValueError(f"port: expected an integer from 1 to 65535; got {command.port}")
    trained = _load(command)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends as Ctrl-C does: the folder is deleted
    with tempfile.TemporaryDirectory(prefix="tarflow-demo-") as folder:
        # gradio reads them when it is imported.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            from ..demo.page import serve
        except ModuleNotFoundError as error:
            raise ImportError(f'demo: the page needs {error.name}: pip install "tarflow[demo]"') from error
        try:
            serve(trained, load_test_images(command.run), command.host, command.port)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # a second one is not to interrupt the deletion
                signal.signal(number, signal.SIG_IGN)


def _load(command: Demo) -> Trained:
    model, metadata = load_model(command.run, command.device)
    if not isinstance(model, TarFlow):
        raise ValueError(f"run: expected a TarFlow; {command.run} holds a {type(model).__name__}")
    if model.config.in_channels not in (1, 3):
        raise ValueError(f"run: expected a model of grey or RGB images; got {model.config.in_channels} channels")
    return Trained(model, metadata, command.run.resolve().name)


def load_test_images(folder: Path) -> ImageDataset | ImageFolder | None:
    """Load the test images of the data that a model was trained on, None where they are not here."""
    try:
        data = read_run(folder).data
        return datasets.load(data.dataset, "test", data.data_dir, data.image_size, data.resize)
    except (OSError, ValueError):
        return None
