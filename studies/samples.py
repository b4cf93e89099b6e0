"""What makes samples better: recipes, guidance, noise, depth, each by scores of samples, over three seeds.

    python studies/samples.py NAME ... --seeds 0 1 2     train these rows and score their samples; all without a name
    python studies/samples.py --report                   write the tables of docs/samples.md and docs/samples-study.png

A row is a training, in flags of `tarflow train`, and the ways in which samples are drawn from it. Rows see the same
images in the same order by their seed. A score that is there is not made again, and a training that was interrupted
goes on. Distances are Frechet distances in the features of the classifier that ships with tarflow; of one number of
samples alone are they comparable.
"""

import argparse
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from tarflow import Guidance, ImageFlow, datasets
from tarflow.cli.train import read_flags
from tarflow.denoising import Denoising
from tarflow.evaluation import noisy_bits_per_dim
from tarflow.features import Extractor, load_classifier
from tarflow.files import atomic_write
from tarflow.hardware import keep_freed_memory
from tarflow.pictures import write_figure
from tarflow.pretrained import read_config
from tarflow.reference import Reference
from tarflow.samples import Sampler, draw_labels, score_samples
from tarflow.training.config import TrainConfig
from tarflow.training.run import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results" / "samples"
PAGE, PICTURE = ROOT / "docs" / "samples.md", ROOT / "docs" / "samples-study.png"
BEGIN, END = "<!-- samples -->", "<!-- /samples -->"
NUM_IMAGES = 1000  # whose bits/dim are scored
BATCH = 250
# Pictures and calibration are none of the recipe's, and the seeds of a row are of one precision on any machine.
COMMON = "--sample-every 1000000000 --no-calibrate --precision float32"


@dataclass(frozen=True)
class Sampling:
    """A way to draw samples: with guidance or without, denoised how often, with labels in turn or with none."""

    guidance: Guidance | None = None
    denoised: int = 2
    labels: bool = True


@dataclass(frozen=True)
class Row:
    """A training, and how its samples are drawn: each way by its name."""

    flags: str
    samplings: dict[str, Sampling]
    num: int = 1000


def guided(weight: float, **options: Any) -> Sampling:
    """Draw with guidance of a weight, or without for 0."""
    return Sampling(Guidance(weight, **options) if weight else None)


WEIGHTS, TAUS = (0, 1, 2, 3, 4, 6), (0.7, 0.85, 1.5)
BEST = {"guidance 3": guided(3), "guidance 3, denoised once": Sampling(Guidance(3.0), denoised=1)}
USUAL = {"guidance 3": guided(3), "no guidance": guided(0)}
NOISY = USUAL | {f"guidance 3, denoised {n}x": Sampling(Guidance(3.0), denoised=n) for n in (0, 1)}
SWEEP = {
    **{f"linear {w}": guided(w) for w in WEIGHTS},
    **{f"constant {w}": guided(w, schedule="constant") for w in (1, 2, 4)},
    **{f"{parameters} 3": guided(3, parameters=parameters) for parameters in ("alpha", "mu")},
    "linear 3 in the first block": guided(3, blocks=1),
    "constant 1 in the first block": guided(1, schedule="constant", blocks=1),
    **{f"linear 3, denoised {n}x": Sampling(Guidance(3.0), denoised=n) for n in (0, 1, 3, 5)},
    "no labels": Sampling(labels=False),
    **{
        f"no labels, tau {tau}, weight {w}": Sampling(
            Guidance(float(w), temperature=tau, drop_label=False), labels=False
        )
        for w in (1, 2)
        for tau in TAUS
    },
}
LEVELLED = {"guidance 3": Guidance(3.0), "guidance 3 in the first block": Guidance(3.0, blocks=1)}
FORMER = "--patch-size 2 --batch-size 16 --optimizer adamw --learning-rate 1e-3 --warmup-steps 100 --max-steps 2200"
SHORTER = "--max-steps 2000 --warmup-steps 200"
SMALL = "--channels 64 --max-steps 800 --warmup-steps 200"

RECIPES = {
    "default": Row("", BEST, num=2000),
    "default-bfloat16": Row("--precision bfloat16", BEST, num=2000),
    "shorter": Row(SHORTER, BEST, num=2000),
    "former": Row(
        FORMER, {f"guidance 2, denoised {n}x": Sampling(Guidance(2.0), denoised=n) for n in (1, 2)}, num=2000
    ),
    "8x1": Row("--num-blocks 8 --layers-per-block 1", BEST, num=2000),
    "shorter-deep-shallow": Row(f"{SHORTER} --layers-per-block 1 1 1 5", BEST, num=2000),
    "shorter-itarflow": Row(
        f"{SHORTER} --layers-per-block 1 1 1 5 --noise-levels 0.01 0.3",
        {f"{name}, 10 levels": Sampling(guidance, denoised=10) for name, guidance in LEVELLED.items()},
        num=2000,
    ),
}
FIGURES = {
    "sampling": Row("", SWEEP),  # of the models of the row "default", which are not trained again
    "small": Row(SMALL, NOISY),
    **{f"sigma-{sigma}": Row(f"{SMALL} --sigma {sigma}", NOISY) for sigma in (0.02, 0.05, 0.2)},
    "uniform": Row(f"{SMALL} --noise uniform", USUAL),
    **{
        f"small-{blocks}x{8 // blocks}": Row(f"{SMALL} --num-blocks {blocks} --layers-per-block {8 // blocks}", USUAL)
        for blocks in (1, 2, 8)
    },
    "volume-preserving": Row(f"{SMALL} --volume-preserving", USUAL),
    "patch-7": Row(f"{SMALL} --patch-size 7", USUAL),
    "drop-0": Row(f"{SMALL} --label-drop 0", USUAL),
}
ROWS = RECIPES | FIGURES


def main(arguments: list[str] | None = None) -> None:
    """Train and score the rows that the command line names, or report what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*ROWS, []], help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/samples"), help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="write the tables and the picture, and run nothing")
    command = parser.parse_args(arguments)
    keep_freed_memory()
    for seed in [] if command.report else command.seeds:
        for name in command.names or ROWS:
            run(name, seed, command.out)
    if command.report:
        report()


def run(name: str, seed: int, out: Path) -> None:
    """Train a row and score its samples, as far as this is not in ``results/samples/``."""
    row, path = ROWS[name], RESULTS / f"{name}-{seed}.json"
    result = json.loads(path.read_text()) if path.exists() else {"name": name, "seed": seed, "scores": {}}
    missing = [sampling for sampling in row.samplings if sampling not in result["scores"]]
    if not missing:
        return
    settings, _ = read_flags([*shlex.split(f"{COMMON} {row.flags}"), f"--seed={seed}"])
    config, folder = settings.config, out / f"{'default' if name == 'sampling' else name}-{seed}"
    model = trained(config, folder)
    result |= {
        "flags": row.flags,
        "steps": config.training.max_steps,
        "images": config.training.max_steps * config.training.batch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "config": asdict(config),
        **bits(model, config),
    }
    for sampling in missing:
        result["scores"][sampling] = score(model, config, row.samplings[sampling], row.num, seed)
        print(f"{name}, seed {seed}, {sampling}: {_brief(result['scores'][sampling])}", flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside:
            beside.write_text(json.dumps(result, default=str, indent=1) + "\n")


def trained(config: TrainConfig, folder: Path) -> ImageFlow:
    """Load the model of a run that has ended, or train it, or go on with its training.

    ValueError where the run is of other settings, as those of a row were before it was changed.
    """
    if (folder / "trajectory.png").exists():  # a run writes it last
        if read_config(folder)["train"] != json.loads(json.dumps(config.config_dict())):
            raise ValueError(f"out: expected the run in {folder} to have the settings of its row; it has others")
        return ImageFlow.from_pretrained(folder)
    return train(config, folder, resume=folder.exists())


def bits(model: ImageFlow, config: TrainConfig) -> dict[str, Any]:
    """Score bits/dim of noisy test images, with the same noise whatever the row and its seed."""
    training = config.training
    test = datasets.load(config.data.dataset, "test", config.data.data_dir)
    pixels, labels = test.get_batch(datasets.evenly_spaced(len(test), NUM_IMAGES))
    if training.noise != "gaussian":
        return {"data": test.source}
    generator = torch.Generator(model.device).manual_seed(0)
    estimate = noisy_bits_per_dim(model, pixels, labels, training.sigma, generator=generator)
    return {"data": test.source, "sigma": training.sigma, "noisy_bits_per_dim": asdict(estimate)}


def score(model: ImageFlow, config: TrainConfig, sampling: Sampling, num: int, seed: int) -> dict[str, Any]:
    """Draw samples, labels in turn, and compare them with the training images."""
    extractor, reference = compared_with(config.data.dataset)
    generator = torch.Generator(model.device)
    sigma = config.training.noise_sigma if sampling.denoised else 0.0
    denoising = Denoising(max(sampling.denoised, 1))
    classes = draw_labels("balanced", num, model.config.num_classes)
    dropped = classes if sampling.labels else torch.full_like(classes, -1)

    def draw(num: int, labels: Tensor | None) -> Tensor:
        drawn = model.sample(num, labels, sampling.guidance, sigma, "sequential", generator, denoising=denoising)
        assert isinstance(drawn, Tensor)
        return drawn

    sampler = Sampler(draw, "round", generator, seed)
    batches: Iterator[tuple[Tensor, Tensor | None]] = sampler.batches(num, dropped, BATCH)
    scores = score_samples(((x, y if sampling.labels else None) for x, y in batches), extractor, reference)
    named = {
        "distance": next(value for key, value in scores.items() if key.startswith("Frechet")),
        "precision": next(value for key, value in scores.items() if key.startswith("precision")),
        "recall": next(value for key, value in scores.items() if key.startswith("recall")),
        "recognised": scores.get("recognised as their class"),
    }
    return {"num": num, "not_finite": sampler.not_finite, **named}


@cache
def compared_with(dataset: str) -> tuple[Extractor, Reference]:
    """Load the classifier and the features of the training images, mirrored as in training."""
    extractor, train_set = load_classifier(torch.device("cpu")), datasets.load(dataset, "train")
    return extractor, Reference.of(train_set, extractor, train_set.flip)


def read_results() -> dict[str, list[dict[str, Any]]]:
    """Read the results of every row, by seed."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["name"], []).append(result)
    return results


def values(results: list[dict[str, Any]], sampling: str, what: str) -> list[float]:
    """Collect a score over the seeds that have it."""
    scored = (result["scores"].get(sampling, {}).get(what) for result in results)
    return [value for value in scored if value is not None]


def mean_and_deviation(numbers: list[float], digits: int = 2) -> str:
    """Write mean and standard deviation over seeds; a single seed has none."""
    if not numbers:
        return "–"
    mean = f"{fmean(numbers):.{digits}f}"
    return f"{mean} ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def report() -> None:
    """Write the tables between their markers, and draw the picture."""
    results = read_results()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n{table(results, RECIPES)}\n\n{table(results, FIGURES)}\n{END}{after}"
    with atomic_write(PAGE) as path:
        path.write_text(text)
    draw(results)


def table(results: dict[str, list[dict[str, Any]]], rows: dict[str, Row]) -> str:
    """Make a Markdown table of rows, a line for every way of sampling: mean and deviation over seeds."""
    lines = [
        "| row: flags | samples | seeds | images seen | noisy bits/dim (sigma) "
        "| distance | precision | recall | recognised |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    missing = []
    for name, row in rows.items():
        known = results.get(name, [])
        for sampling in row.samplings:
            scored = [result for result in known if sampling in result["scores"]]
            if not scored:
                missing.append(f"`{name}` ({sampling})")
                continue
            found = [result["noisy_bits_per_dim"]["mean"] for result in scored if "sigma" in result]
            sigma = f" ({scored[0]['sigma']:g})" if found else ""
            scores = (
                mean_and_deviation(values(scored, sampling, what), digits)
                for what, digits in (("distance", 2), ("precision", 3), ("recall", 3), ("recognised", 3))
            )
            flags = f"`{row.flags}`" if row.flags else "the default"
            lines.append(
                f"| `{name}`: {flags} | {sampling}, n = {row.num:,} | {len(scored)} | {scored[0]['images']:,} "
                f"| {mean_and_deviation(found, 3)}{sigma} | {' | '.join(scores)} |"
            )
    return "\n".join([*lines, *(["", f"Not measured: {', '.join(missing)}."] if missing else [])])


_COLORS = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
_STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 7}


Results = dict[str, list[dict[str, Any]]]


@rc_context(_STYLE)
def draw(results: Results) -> None:
    """Draw the panels whose rows are there; dots are seeds, lines go through their means."""
    panels = [panel for panel, rows in PANELS.items() if all(map(partial(_is_whole, results), rows))]
    if not panels:
        return
    figure = Figure(figsize=(3.6 * min(2, len(panels)), 2.7 * -(-len(panels) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), subplot_kw={"yscale": "log"}, squeeze=False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        panel(axes, results)
        axes.set_ylabel("distance")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.2, 0.5)))
        axes.grid(axis="y", which="both", linewidth=0.4, alpha=0.5)
        axes.legend(frameon=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    write_figure(figure, PICTURE, vector=True, dpi=200)


def _is_whole(results: Results, name: str) -> bool:
    """Whether some seed of a row has all its samples."""
    return any(result["scores"].keys() >= ROWS[name].samplings.keys() for result in results.get(name, []))


def _draw_guidance(axes: Axes, results: Results) -> None:
    swept = results["sampling"]
    _line(axes, swept, {w: f"linear {w}" for w in WEIGHTS}, "linear", _COLORS[0])
    _line(axes, swept, {0: "linear 0"} | {w: f"constant {w}" for w in (1, 2, 4)}, "constant", _COLORS[1])
    _line(axes, swept, {3: "alpha 3"}, "alpha alone, linear", _COLORS[2])
    _line(axes, swept, {3: "mu 3"}, "mu alone, linear", _COLORS[3])
    axes.set_xlabel("guidance weight")


def _draw_denoising(axes: Axes, results: Results) -> None:
    named = {0: "linear 3, denoised 0x", 1: "linear 3, denoised 1x", 2: "linear 3"}
    named |= {n: f"linear 3, denoised {n}x" for n in (3, 5)}
    _line(axes, results["sampling"], named, "guidance 3", _COLORS[0])
    axes.set_xlabel("steps of denoising")


def _draw_temperature(axes: Axes, results: Results) -> None:
    for w, color in zip((1, 2), _COLORS, strict=False):
        at = {tau: f"no labels, tau {tau}, weight {w}" for tau in TAUS} | {1: "no labels"}
        _line(axes, results["sampling"], dict(sorted(at.items())), f"weight {w}", color)
    axes.set_xlabel("temperature of the reference branch, without labels")


def _draw_noise(axes: Axes, results: Results) -> None:
    for sampling, label, color in (
        ("guidance 3", "denoised twice", _COLORS[0]),
        ("guidance 3, denoised 1x", "denoised once", _COLORS[3]),
        ("guidance 3, denoised 0x", "as drawn", _COLORS[1]),
    ):
        _rows(axes, {sigma: results[name] for sigma, name in SIGMAS.items()}, sampling, label, color)
    _rows(axes, {0.0: results["uniform"]}, "guidance 3", "uniform noise", _COLORS[2])
    axes.set_xticks([0.0, *SIGMAS])
    axes.set_xlabel("sigma of the training noise")


def _draw_architecture(axes: Axes, results: Results) -> None:
    places = {place: results[name] for place, name in enumerate(ARCHITECTURES)}
    for sampling, color in (("guidance 3", _COLORS[0]), ("no guidance", _COLORS[1])):
        _rows(axes, places, sampling, sampling, color, line="none")
    axes.set_xticks(range(len(places)), ARCHITECTURES, rotation=40, ha="right")


SIGMAS = {0.02: "sigma-0.02", 0.05: "sigma-0.05", 0.1: "small", 0.2: "sigma-0.2"}
ARCHITECTURES = [name for name in FIGURES if name not in ("sampling", "uniform", *SIGMAS.values())] + ["small"]
PANELS = {
    _draw_guidance: ["sampling"],
    _draw_denoising: ["sampling"],
    _draw_temperature: ["sampling"],
    _draw_noise: [*SIGMAS.values(), "uniform"],
    _draw_architecture: ARCHITECTURES,
}


def _line(axes: Axes, results: list[dict[str, Any]], samplings: dict[float, str], label: str, color: str) -> None:
    """Draw the ways of sampling of one row."""
    points = {at: values(results, name, "distance") for at, name in samplings.items()}
    _points(axes, points, label, color, "-")


def _rows(
    axes: Axes, rows: dict[float, list[dict[str, Any]]], sampling: str, label: str, color: str, line: str = "-"
) -> None:
    """Draw one way of sampling of several rows."""
    _points(axes, {at: values(results, sampling, "distance") for at, results in rows.items()}, label, color, line)


def _points(axes: Axes, points: dict[float, list[float]], label: str, color: str, line: str) -> None:
    found = {at: numbers for at, numbers in points.items() if numbers}
    for at, numbers in found.items():
        axes.plot([at] * len(numbers), numbers, ".", color=color, markersize=3.5, alpha=0.7)
    means = [fmean(numbers) for numbers in found.values()]
    axes.plot([*found], means, linestyle=line, color=color, linewidth=1, marker="_", markersize=7, label=label)


def _brief(scores: dict[str, Any]) -> str:
    recognised = scores["recognised"] if scores["recognised"] is not None else math.nan
    return f"distance {scores['distance']:.2f}, recognised {recognised:.3f}, not finite {scores['not_finite']}"


if __name__ == "__main__":
    main()
