"""Pictures show the values that they are given, whole, and disturb nothing else."""

import json
import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch.testing import assert_close

from tarflow import FlowPP, FlowPPConfig, Guidance, TarFlow, TarFlowConfig
from tarflow.noise import add_gaussian_noise, quantization, to_pixels
from tarflow.pictures import Gallery, curves, sample_grid, trajectory

LEVELS = torch.arange(256)


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def find(picture, color):
    """The rows and columns of the picture's pixels of a color."""
    return np.nonzero((picture == color).all(axis=-1))


def plain(*values):
    """Images of one color each, values (..., C) in [-1, 1]: float (..., C, 8, 8)."""
    return torch.tensor(np.array(values))[..., None, None].expand(*np.shape(values), 8, 8)


def training_row(step, **more):
    noise = np.sin(step)
    return {"step": step, "bits_per_dim": 3 + noise, "grad_norm": 1 + noise**2, "learning_rate": 1e-4} | more


def write_rows(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def curves_of(tmp_path, rows, tail=""):
    curves(write_rows(tmp_path / "metrics.jsonl", rows, tail), tmp_path / "curves.png", "a run")
    return read(tmp_path / "curves.png")


def shown(color):
    """The pixel that a grid draws for a color in [-1, 1]."""
    return to_pixels(torch.tensor(color), "round").tolist()


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.49, 0.5, 0.99])
def test_every_level_comes_back_from_all_of_its_bin_or_after_gaussian_noise_from_around_it(offset):
    levels = LEVELS.to(torch.uint8)
    assert (quantization(sigma=0.0), quantization(sigma=0.05)) == ("floor", "round")
    assert torch.equal(to_pixels(2 * (LEVELS + offset) / 256 - 1, "floor"), levels)
    around = add_gaussian_noise(levels, sigma=0.0) + (0.98 * offset - 0.49) / 127.5
    assert torch.equal(to_pixels(around, "round"), levels)


@pytest.mark.parametrize(
    ("rule", "bias"),
    [("round", lambda p: 0 * p), ("truncate", lambda p: 0 * p - 0.5), ("floor", lambda p: p / 255 - 0.5)],
    ids=["round", "truncate", "floor"],
)
def test_only_rounding_has_no_bias_around_the_levels_of_gaussian_noise(rule, bias):
    inner = LEVELS[3:-3].float()
    around = torch.arange(-1.5, 1.5, 1 / 256)[:, None] + 1 / 512
    pixels = to_pixels((inner + around) / 127.5 - 1, rule)
    assert_close(pixels.float().mean(0) - inner, bias(inner), rtol=0, atol=0.01)


@pytest.mark.parametrize("rule", ["round", "floor", "truncate"])
def test_pixels_stay_within_8_bits(rule):
    beyond = torch.tensor([-7.0, 1.0, 7.0, -torch.inf, torch.inf, torch.nan])
    assert to_pixels(beyond, rule).tolist() == [0, 255, 255, 0, 255, 0]


def test_a_grid_shows_each_image_in_its_place_and_color(tmp_path):
    colors = np.random.default_rng(0).uniform(-0.9, 0.9, (3, 4, 3)).astype(np.float32)
    sample_grid(plain(*colors), tmp_path / "grid.png", "samples", row_labels=["one", "two", "three"])
    picture = read(tmp_path / "grid.png")
    places = np.array([[np.mean(find(picture, shown(color)), axis=1) for color in row] for row in colors])
    areas = {len(find(picture, shown(color))[0]) for color in colors.reshape(-1, 3)}
    assert areas == {112 * 112}, "each 8 x 8 image is 14-fold"
    assert np.allclose(np.diff(places, axis=0), (116, 0), atol=1), "one row is straight below the other"
    assert np.allclose(np.diff(places, axis=1), (0, 116), atol=1), "one column is straight beside the other"


def test_a_grid_clips_and_draws_gray_for_one_channel(tmp_path):
    sample_grid(plain([[-3.0], [0.25]]), tmp_path / "grid.png", "samples")
    assert len(find(read(tmp_path / "grid.png"), (0, 0, 0))[0]) >= 112 * 112
    assert len(find(read(tmp_path / "grid.png"), (159, 159, 159))[0]) >= 112 * 112


@pytest.mark.parametrize(
    ("rule", "value", "pixel"), [("round", 234.9, 235), ("floor", 235.2, 236), ("truncate", 234.9, 234)]
)
def test_pictures_are_quantized_as_told(tmp_path, rule, value, pixel):
    image = plain([[value / 127.5 - 1]])
    sample_grid(image, tmp_path / "grid.png", "samples", quantization=rule)
    trajectory(image, tmp_path / "trajectory.png", "steps", ["image"], quantization=rule)
    for name in ("grid.png", "trajectory.png"):
        assert len(find(read(tmp_path / name), (pixel, pixel, pixel))[0]) >= 112 * 112


def titles(monkeypatch):
    """The titles that are drawn from now on."""
    drawn = []
    set_title = Axes.set_title
    monkeypatch.setattr(
        Axes, "set_title", lambda axes, text, **more: drawn.append(text) or set_title(axes, text, **more)
    )
    return drawn


def test_a_title_counts_what_is_not_finite(tmp_path, monkeypatch):
    drawn = titles(monkeypatch)
    images = plain([[0.0], [np.nan], [0.1]], [[0.2], [-np.inf], [np.nan]])
    sample_grid(images, tmp_path / "grid.png", "samples")
    trajectory(images, tmp_path / "trajectory.png", "steps", ["one", "two"])
    sample_grid(images[:, :1], tmp_path / "grid.png", "samples")
    assert drawn == ["samples (3 of 6 not finite)", "steps (2 of 3 not finite)", "samples"]


def test_a_trajectory_shows_the_finite_samples_and_is_drawn_without_any(tmp_path):
    trajectory(plain([[0.5], [np.inf], [np.nan]]), tmp_path / "some.png", "steps", ["image"])
    assert len(find(read(tmp_path / "some.png"), shown([0.5] * 3))[0]) >= 128 * 128
    trajectory(plain([[np.inf], [np.nan]]), tmp_path / "none.png", "steps", ["image"])
    assert (tmp_path / "none.png").is_file()


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    name = r"cost: $\frac{5$"
    sample_grid(plain([[0.5]]), tmp_path / "grid.png", name, [name])
    trajectory(plain([[0.5]]), tmp_path / "trajectory.png", name, ["$\\frac{"])
    curves(write_rows(tmp_path / "metrics.jsonl", [training_row(1)]), tmp_path / "curves.png", name)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["curves.png", "grid.png", "trajectory.png"]


def test_a_trajectory_shrinks_only_the_columns_that_reach_beyond_the_images(tmp_path):
    frames = plain([[-4.0], [2.0]], [[-0.5], [0.25]])
    trajectory(frames, tmp_path / "trajectory.png", "steps", ["latent", "after block 1"])
    picture = read(tmp_path / "trajectory.png")
    columns = []
    for value in (-1.0, 0.5, -0.5, 0.25):
        rows, across = find(picture, shown([value] * 3))
        assert len(rows) >= 128 * 128
        columns.append(np.median(across))
    assert max(columns[:2]) < min(columns[2:]), "the first step stands left"


@pytest.mark.parametrize("rows", [1, 2, 500])
def test_curves_draw_runs_of_any_length(tmp_path, rows):
    picture = curves_of(tmp_path, [training_row(step) for step in range(rows)])
    for color in ("#0072b2", "#009e73", "#555555"):
        rgb = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
        assert len(find(picture, rgb)[0]), f"no line of {color}"


@pytest.mark.parametrize("key", ["bits_per_dim", "grad_norm", "learning_rate"])
def test_curves_leave_out_what_is_missing(tmp_path, key):
    rows = [training_row(step) for step in range(30)]
    missing = [{name: value for name, value in row.items() if name != key} for row in rows]
    assert not np.array_equal(curves_of(tmp_path, missing), curves_of(tmp_path, rows))


ROWS = [training_row(step) for step in range(100)]
WITHOUT_EFFECT = {
    "not finite": ROWS
    + [row | {key: bad} for row in ROWS for key in row if key != "step" for bad in (None, math.nan, math.inf)],
    "lost by a resumed run": ROWS[:50] + [training_row(step, bits_per_dim=9.0) for step in range(50, 60)] + ROWS[50:],
}


@pytest.mark.parametrize("rows", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
@pytest.mark.parametrize("tail", ["", '{"step": 5, "bits'], ids=["", "unfinished last line"])
def test_curves_pass_over_what_is_not_finite_or_lost_or_unfinished(tmp_path, rows, tail):
    assert np.array_equal(curves_of(tmp_path, rows, tail), curves_of(tmp_path, ROWS))


def test_curves_fall_back_to_the_loss(tmp_path):
    rows = [{"step": step, "loss": 2 - step / 10, "eval_loss": 2.0} for step in range(10)]
    assert len(find(curves_of(tmp_path, rows), (0, 0x72, 0xB2))[0])


@pytest.mark.parametrize(
    "text", ["", '{"step": 1}\nstep 2\n', '{"loss": 1}\n', "[1]\n", '{"step": 1, "loss": {}}\n', '{"step": "x"}\n']
)
def test_curves_name_the_file_they_cannot_read(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics_path: expected .* in .*metrics\.jsonl, got"):
        curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "a run")
    with pytest.raises(FileNotFoundError, match="metrics_path: expected a file"):
        curves(tmp_path / "none.jsonl", tmp_path / "curves.png", "a run")


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 1, 8, 8), torch.zeros(1, 2, 2, 8, 8), plain([[0]]), plain([[0.0]])[:0]]
)
def test_images_of_another_kind_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match=r"images: expected float \(rows, columns, C, H, W\)"):
        sample_grid(images, tmp_path / "grid.png", "samples")
    with pytest.raises(ValueError, match=r"frames: expected float \(steps, B, C, H, W\)"):
        trajectory(images, tmp_path / "grid.png", "samples", [])


def test_labels_are_one_a_row_or_column(tmp_path):
    with pytest.raises(ValueError, match="row_labels: expected 2, one a row, got 1"):
        sample_grid(plain([[0.0]], [[0.0]]), tmp_path / "grid.png", "samples", ["one"])
    with pytest.raises(ValueError, match="column_labels: expected 2, one a step, got 3"):
        trajectory(plain([[0.0]], [[0.0]]), tmp_path / "grid.png", "samples", ["one", "two", "three"])


def test_a_killed_write_leaves_the_picture_that_was_there(tmp_path, monkeypatch):
    sample_grid(plain([[0.5]]), tmp_path / "grid.png", "samples")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    before = (tmp_path / "grid.png").read_bytes()

    def killed(self, target, **options):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        sample_grid(plain([[-0.5]]), tmp_path / "grid.png", "samples")
    assert (tmp_path / "grid.png").read_bytes() == before


def test_the_callers_matplotlib_settings_stay(tmp_path):
    before = dict(matplotlib.rcParams)
    sample_grid(plain([[0.5]]), tmp_path / "grid.png", "samples")
    curves_of(tmp_path, [training_row(1)])
    assert dict(matplotlib.rcParams) == before


def test_the_suffix_chooses_the_format(tmp_path):
    sample_grid(plain([[0.5]]), tmp_path / "grid.pdf", "samples")
    assert (tmp_path / "grid.pdf").read_bytes().startswith(b"%PDF")


TARFLOW = TarFlowConfig(image_size=8, channels=32, head_dim=16, num_blocks=2, layers_per_block=1, num_classes=3)
FLOWPP = FlowPPConfig(image_size=8, filters=8, blocks_per_coupling=1, stack="squeeze channel1 stripe1")
MODELS = {
    "TarFlow": (TarFlow(TARFLOW), ["latent", "after block 2", "after block 1"]),
    "Flow++": (FlowPP(FLOWPP), ["latent", "after stripe couplings", "after channel couplings", "image"]),
}


@pytest.mark.parametrize(("model", "columns"), MODELS.values(), ids=MODELS)
def test_a_gallery_draws_what_any_model_says_it_has(tmp_path, monkeypatch, model, columns):
    grids, ways = [], []
    monkeypatch.setattr("tarflow.pictures.sample_grid", lambda images, path, title, names, rule: grids.append(names))
    monkeypatch.setattr("tarflow.pictures.trajectory", lambda frames, path, title, names, rule: ways.append(names))
    gallery = Gallery(["ant", "bee"] if model.config.num_classes else ())
    gallery.save_samples(model, tmp_path / "grid.png", "samples", num=6)
    gallery.save_trajectory(model, tmp_path / "way.png", "way")
    assert grids == [["ant", "bee", "class 2"] if model.config.num_classes else None]
    assert ways == [columns]
    labels = torch.arange(3) if model.config.num_classes else None
    (drawn,), (again,) = (gallery.draw_samples(model, 3, labels) for _ in range(2))
    assert torch.equal(drawn, again)


def test_a_gallery_with_settings_that_a_model_has_no_use_for_says_so():
    model, _ = MODELS["Flow++"]
    for settings in ({"guidance": Guidance(2.0)}, {"denoise_sigma": 0.1}, {"decoder": "jacobi"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected .* since Flow"):
            Gallery(**settings).draw_samples(model, 2)
