"""The page of ``tarflow demo``, in gradio: three tabs over the functions of :mod:`.tasks`."""

import base64
import html
import io
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..datasets import ImageDataset, ImageFolder
from ..decoding import TOLERANCE, Decoder
from ..guidance import Guidance
from ..noise import to_pixels
from ..validation import not_finite
from .tasks import Settings, Stage, Trained, draw, interpolate, read, score, to_model

__all__ = ["build", "serve"]

Dataset = ImageDataset | ImageFolder | None

MAX_FILE_SIZE = "5mb"
KEPT_SECONDS = 600
"""Time after which uploaded and shown pictures are deleted."""
FONT = ("system-ui", "sans-serif")
THEME = gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace"))
CSS = """
.figures {display: flex; flex-wrap: wrap; gap: 12px}
.figures figure {margin: 0}
.figures img {image-rendering: pixelated; max-width: 100%}
.figures figcaption {font-size: small}
footer {display: none !important}
"""
IN_TURN, NO_LABEL = "each class in turn", "no label"
TEST_IMAGE, UPLOAD, DRAWING = "test image", "upload", "drawing"
MOST_IMAGES, SHOWN_IN_TRAJECTORY, DRAWS = 32, 4, 8


def serve(trained: Trained, test_images: Dataset, host: str, port: int) -> None:
    """Serve the page until it is interrupted; to nobody but this machine, unless the host says otherwise."""
    page = build(trained, test_images)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        max_file_size=MAX_FILE_SIZE,
        theme=THEME,
        css=CSS,
        footer_links=[],
        prevent_thread_lock=True,
    )
    print(f"{trained.name} at http://{host}:{port}, until Ctrl-C", flush=True)
    page.block_thread()


def build(trained: Trained, test_images: Dataset = None) -> gr.Blocks:
    """Make the page of a model; without test images, images are uploaded or drawn."""
    page = gr.Blocks(analytics_enabled=False, title="tarflow", delete_cache=(KEPT_SECONDS, KEPT_SECONDS))
    with page:
        gr.Markdown(f"# tarflow\n{trained.name}: {trained.model.config.summary}")
        with gr.Tab("Sample"):
            _sample_tab(trained)
        with gr.Tab("Score"):
            _score_tab(trained, test_images)
        with gr.Tab("Interpolate"):
            _interpolate_tab(trained, test_images)
    return page


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Within the block, an error that names what was wrong is shown on the page as that message."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def _sample_tab(trained: Trained) -> None:
    classes, steps = trained.class_names, trained.metadata["denoising_steps"]
    with gr.Row():
        with gr.Column(min_width=280):
            label = gr.Dropdown([IN_TURN, *classes, NO_LABEL], value=IN_TURN, label="Class", visible=bool(classes))
            num = gr.Slider(1, MOST_IMAGES, 8, step=1, label="Images")
            weight = gr.Slider(0, 10, 3 if classes else 0, step=0.5, label="Guidance weight (0 for none)")
            schedule = gr.Radio(["linear", "constant"], value="linear", label="Guidance schedule")
            temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Reference temperature (1 for none)")
            denoising = gr.Slider(
                0,
                max(5, steps or 1),
                0 if not trained.sigma else steps or 1,
                step=1,
                label="Denoising steps (0 leaves the noise)",
                visible=bool(trained.sigma),
            )
            seed = _seed()
            with gr.Accordion("Decoder", open=False):
                decoder = gr.Radio(["auto", "jacobi", "sequential"], value="auto", label="Decoder")
                tolerance = gr.Number(TOLERANCE, label="Tolerance of auto and jacobi, in latents")
                beside = gr.Checkbox(False, label="Decode once more, sequentially, and compare")
            button = gr.Button("Sample", variant="primary")
        with gr.Column(min_width=280, scale=2):
            samples, cost, trajectory = gr.HTML(padding=False), gr.Markdown(), gr.HTML(padding=False)

    def show(label, num, weight, schedule, temperature, denoising, seed, decoder, tolerance, beside):
        with _errors_shown():
            settings = Settings(
                int(num),
                None if label == IN_TURN else -1 if label == NO_LABEL else classes.index(label),
                Guidance(weight, schedule, temperature) if weight else None,
                Decoder(decoder, tolerance=0.0 if decoder == "sequential" else tolerance),
                int(denoising),
                int(seed),
            )
            names, shown = _names(trained, settings), []
            decoded = stage = None
            for stage in draw(trained, settings):
                decoded = stage if "denoising" not in stage.name else decoded
                shown.append((_tiles(trained, stage.images[:SHOWN_IN_TRAJECTORY], side=84), stage.name))
                yield _each(trained, stage.images, names), _figures(shown), _cost(stage)
            if beside and decoder != "sequential":
                yield gr.skip(), gr.skip(), f"{_cost(stage)} Decoding once more, sequentially ..."
                yield gr.skip(), gr.skip(), _comparison(trained, settings, decoded)

    inputs = [label, num, weight, schedule, temperature, denoising, seed, decoder, tolerance, beside]
    button.click(show, inputs, [samples, trajectory, cost], concurrency_id="model", api_name="sample")


def _names(trained: Trained, settings: Settings) -> list[str]:
    """What is written below each sample: its class."""
    labels = trained.labels(settings.num, settings.label)
    names = dict(enumerate(trained.class_names)) | {-1: NO_LABEL}
    return [""] * settings.num if labels is None else [names[label] for label in labels.tolist()]


def _cost(stage: Stage) -> str:
    bad = len(not_finite(stage.images))
    warning = f" {bad} of {len(stage.images)} images are not finite." if bad else ""
    return f"{stage.name}: {stage.seconds:.2f} s, {stage.passes} passes for {stage.steps} steps.{warning}"


def _comparison(trained: Trained, settings: Settings, decoded: Stage) -> str:
    """Decode the same latents sequentially, and compare time, passes and images before denoising."""
    sequential = replace(settings, decoder=Decoder("sequential"), denoising_steps=0)
    (exact,) = deque(draw(trained, sequential), maxlen=1)
    apart = (decoded.images - exact.images).abs().max().item()
    rows = [
        f"| {name} | {stage.seconds:.2f} s | {stage.passes} |"
        for name, stage in ((str(settings.decoder), decoded), ("sequential", exact))
    ]
    return "\n".join(
        [
            "| decoder | time, one run | passes |",
            "|---|---|---|",
            *rows,
            f"\nThe largest difference between their images, in [-1, 1] and before denoising, is {apart:.1e}.",
        ]
    )


def _score_tab(trained: Trained, test_images: Dataset) -> None:
    with gr.Row():
        with gr.Column(min_width=280):
            chosen = _picker(test_images, "Image", 0, [UPLOAD, DRAWING])
            invert = _invert(trained)
            seed = _seed()
            button = gr.Button("Score", variant="primary")
        with gr.Column(min_width=280, scale=2):
            text = gr.Markdown()
            posterior = gr.Label(label="Class, by Bayes' rule", num_top_classes=5, visible=bool(trained.class_names))
            pictures = gr.HTML(padding=False)

    def show(invert, seed, *choice):
        with _errors_shown():
            pixels, done = _read_choice(trained, test_images, invert, *choice)
            found = score(trained, pixels, DRAWS, int(seed))
        images = {"as the model sees it": pixels, "its latents": found.latents, "back again": found.reconstruction}
        shown = _figures([(_tiles(trained, image, side=196), name) for name, image in images.items()])
        names = trained.class_names
        bars = None if found.posterior is None else dict(zip(names, found.posterior.tolist(), strict=True))
        return _report(trained, done, found), bars, shown

    button.click(show, [invert, seed, *chosen], [text, posterior, pictures], concurrency_id="model", api_name="score")


def _report(trained: Trained, done: str, found: Any) -> str:
    kind = f"Gaussian noise of sigma {trained.sigma:g}" if trained.sigma else "noise within the bins of its pixels"
    what = "a density of noisy images, no code length" if trained.sigma else "an upper bound for the 8-bit image"
    classes = ", all classes counting equally" if trained.class_names else ""
    back = "the same 8-bit pixels" if found.same_bytes else "other 8-bit pixels"
    return (
        f"**{found.bits_per_dim} bits/dim** of the image with {kind}, ± the standard error of {DRAWS} draws of it"
        f"{classes}: {what}.\n\n"
        f"The image: {done}.\n\n"
        f"Its latents, without noise, lead back to {back}; the largest error is {found.largest_error:.1e} in [-1, 1]."
    )


def _interpolate_tab(trained: Trained, test_images: Dataset) -> None:
    with gr.Row():
        with gr.Column(min_width=280):
            first = _picker(test_images, "From", 0, [UPLOAD])
        with gr.Column(min_width=280):
            second = _picker(test_images, "To", 1, [UPLOAD])
    with gr.Row():
        num = gr.Slider(3, MOST_IMAGES, 8, step=1, label="Frames", min_width=280)
        seed = _seed()
        invert = _invert(trained)
    button = gr.Button("Interpolate", variant="primary")
    text, frames = gr.Markdown(), gr.HTML(padding=False)

    def show(num, invert, seed, *choices):
        with _errors_shown():
            half = len(choices) // 2
            read_choices = [
                _read_choice(trained, test_images, invert, *choice) for choice in (choices[:half], choices[half:])
            ]
            images = interpolate(trained, *(pixels for pixels, _ in read_choices), int(num), int(seed))
        noise = (
            f"noise of sigma {trained.sigma:g} added before, and removed after" if trained.sigma else "without label"
        )
        done = "; ".join(f"{end}: {done}" for end, (_, done) in zip(("from", "to"), read_choices, strict=True))
        text = f"Latents on the arc between those of the two images, {noise} ({done})."
        return text, _each(trained, images, [f"{t:.2f}" for t in torch.linspace(0, 1, int(num))])

    inputs = [num, invert, seed, *first, *second]
    button.click(show, inputs, [text, frames], concurrency_id="model", api_name="interpolate")


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, min_width=160)


def _invert(trained: Trained) -> gr.Checkbox:
    return gr.Checkbox(
        True,
        label="Invert an image with a light border",
        info="for a model of images that are light on dark",
        visible=trained.model.config.in_channels == 1,
        min_width=280,
    )


def _picker(test_images: Dataset, label: str, number: int, sources: list[str]) -> list[gr.components.Component]:
    """The controls that choose an image: where it is from, its number among the test images, a file, a drawing."""
    if test_images is not None:
        sources = [TEST_IMAGE, *sources]
    source = gr.Radio(sources, value=sources[0], label=label)
    parts = {
        TEST_IMAGE: gr.Number(
            number,
            label=f"{label}: number of the test image, from 0 to {len(test_images or ()) - 1}",
            precision=0,
            visible=sources[0] == TEST_IMAGE,
        ),
        UPLOAD: gr.Image(
            label=f"{label}: file",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            visible=sources[0] == UPLOAD,
            height=280,
        ),
        DRAWING: gr.Sketchpad(
            label=f"{label}: drawing",
            type="pil",
            canvas_size=(280, 280),
            fixed_canvas=True,
            layers=False,
            transforms=(),
            brush=gr.Brush(default_size=24, colors=["#000000"], color_mode="fixed"),
            visible=False,
        ),
    }
    source.change(
        lambda chosen: [gr.update(visible=name == chosen) for name in parts],
        source,
        list(parts.values()),
        api_visibility="private",
        show_progress="hidden",
    )
    return [source, *parts.values()]


def _read_choice(
    trained: Trained, test_images: Dataset, invert: bool, source: str, number: int, file: str | None, drawing: Any
) -> tuple[Tensor, str]:
    """The image of the controls of a picker as the model takes it, and what was done to it."""
    shape = trained.model.config.image_shape
    if source == TEST_IMAGE and test_images is not None:
        if not 0 <= (number or 0) < len(test_images):
            raise ValueError(f"number of the test image: expected 0 to {len(test_images) - 1}; got {number}")
        images, labels = test_images.get_batch(torch.tensor([number or 0]))
        names = dict(enumerate(trained.class_names))
        return images, f"test image {number or 0}, {names.get(int(labels), 'without label')}"
    if source == DRAWING:
        if drawing is None or drawing["composite"] is None:
            raise ValueError("drawing: expected one; got an empty canvas")
        return to_model(drawing["composite"], shape, invert)
    if file is None:
        raise ValueError("file: expected an image; got none")
    return read(Path(file), shape, invert)


def _tiles(trained: Trained, images: Tensor, columns: int = 2, side: int = 112) -> np.ndarray:
    """Join images, uint8 or float, to one picture, each of at least that many pixels, in rows of so many.

    Values beyond [-1, 1], as those of latents, are shown relative to the largest of all but half a percent.
    """
    if images.dtype != torch.uint8:
        finite = images[images.isfinite()].abs()
        largest = finite.quantile(0.995).clamp(min=1) if 0 < finite.numel() < 2**24 else 1
        images = to_pixels(images / largest, trained.quantization)
    columns = min(columns, len(images))
    images = torch.cat((images, images.new_zeros(-len(images) % columns, *images.shape[1:])))
    zoom = max(1, side // images.shape[-1])
    cells = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3).unflatten(0, (-1, columns))
    return cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()


def _each(trained: Trained, images: Tensor, captions: Iterable[str]) -> str:
    """Show every image by itself."""
    return _figures((_tiles(trained, image[None]), caption) for image, caption in zip(images, captions, strict=True))


def _figures(pictures: Iterable[tuple[np.ndarray, str]]) -> str:
    """Show pictures, uint8 (H, W, C), with captions, beside each other as far as the page is wide; in no file."""
    figures = []
    for picture, caption in pictures:
        file, text = io.BytesIO(), html.escape(caption)
        Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(file, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        figures.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    return f'<div class="figures">{"".join(figures)}</div>'
