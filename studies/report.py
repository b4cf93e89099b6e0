"""Write the tables of the study between their markers in docs/flowpp.md, and docs/study.png, from studies/results/.

A difference between two rows is the mean over images of their differences, which vary far less than the bits of either.
Errors are over images, but for means over several seeds of training.
"""

import json
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from fashion_mnist import RESULTS, ROWS, TRAINING
from tarflow.evaluation import Estimate
from tarflow.files import atomic_write
from tarflow.pictures import write_figure

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "flowpp.md", ROOT / "docs" / "study.png"
BEGIN, END = "<!-- study -->", "<!-- /study -->"
# How many bits/dim does the first row lose against the second?
DIFFERENCES = {
    "no variational dequantization": ("flowpp-uniform", "flowpp-variational"),
    "no mixture": ("flowpp-affine", "flowpp-variational"),
    "no attention": ("flowpp-without-attention", "flowpp-variational"),
    "no attention, half as wide": ("flowpp-half-without-attention", "flowpp-half"),
    "TarFlow: no mixture (uniform)": ("tarflow-uniform", "tarflow-mixture-uniform"),
    "TarFlow: no mixture (variational)": ("tarflow-variational", "tarflow-mixture-variational"),
    "TarFlow affine: uniform": ("tarflow-uniform", "tarflow-variational"),
    "TarFlow mixture: uniform": ("tarflow-mixture-uniform", "tarflow-mixture-variational"),
    "RealNVP-style: uniform": ("realnvp-uniform", "realnvp-variational"),
}


def main() -> None:
    """Print the tables, write them into their page, and draw the picture."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    text = f"{table(results)}\n\n{differences(results)}\n\n{errors(results)}"
    print(text)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    with atomic_write(PAGE) as path:
        path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    draw(results, PICTURE)


def table(results: list[dict]) -> str:
    """Make a Markdown table with a line for each result."""
    lines = [
        "| model | dequantization | parameters | one sample | weighted | round trip | training | row, steps, seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in ROWS.items():
        title = f"| {row.title} | {row.noise}"
        known = [result for result in results if result["name"] == name]
        lines += [f"{title} | – | not measured | not measured | – | – | `{name}` |"] * (not known)
        for result in known:
            one, weighted = (Estimate.of(torch.tensor(result[what])) for what in ("one_sample", "weighted"))
            minutes = "–" if result["seconds"] is None else f"{result['seconds'] / 60:.0f} min"
            lines.append(
                f"{title} | {result['parameters']:,} | {one.mean:.3f} ± {one.standard_error:.3f} "
                f"| {weighted.mean:.3f} ± {weighted.standard_error:.3f} | {result['round_trip']['max']:.0e} "
                f"| {minutes} | `{name}`, {steps_of(result):,}, {result['seed']} |"
            )
    return "\n".join(lines)


def differences(results: list[dict]) -> str:
    """Make a Markdown table of the bits/dim that are lost, image by image, at equal steps and seeds."""
    lines = [
        "| lost | steps | seed | bits/dim, paired over images | standard errors over images |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title, (name, against) in DIFFERENCES.items():
        others = {(steps_of(other), other["seed"]): other for other in results if other["name"] == against}
        by_steps: dict[int, list[float]] = {}
        for result in (result for result in results if result["name"] == name):
            steps, seed = steps_of(result), result["seed"]
            if (steps, seed) not in others:
                continue
            more = Estimate.of(torch.tensor(result["weighted"]) - torch.tensor(others[steps, seed]["weighted"]))
            by_steps.setdefault(steps, []).append(more.mean)
            lines.append(
                f"| {title} | {steps:,} | {seed} | {more.mean:+.4f} ± {more.standard_error:.4f} "
                f"| {more.mean / more.standard_error:+.0f} |"
            )
        lines += [
            f"| {title} | {steps:,} | mean of {len(seeds)} | {fmean(seeds):+.4f} ± {stdev(seeds):.4f} | – |"
            for steps, seeds in by_steps.items()
            if len(seeds) > 1
        ]
    return "\n".join(lines)


def errors(results: list[dict]) -> str:
    """Say in a sentence what the errors include and what they do not."""
    (images,) = {len(result["weighted"]) for result in results}
    runs = Counter((result["name"], steps_of(result)) for result in results).values()
    times = "once" if max(runs) == 1 else f"up to {max(runs)} times"
    return (
        f"± is the standard error over {images:,} test images, for one run of training: what other test images would\n"
        f"change; of a mean it is the standard deviation over seeds of training. Each model was trained {times}."
    )


def steps_of(result: dict) -> int:
    """The number of steps of its training."""
    config = result["config"]
    return config.get("training", config)["max_steps"]  # once all settings lay side by side


def draw(results: list[dict], path: Path) -> None:
    """Draw bits/dim by model after the usual number of steps, hollow for uniform and filled for variational noise."""
    titles = list(dict.fromkeys(row.title for row in ROWS.values()))
    with rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.2, 3.0), layout="constrained")
        axes = figure.subplots()
        for result in results:
            if steps_of(result) != TRAINING.max_steps:
                continue
            row = ROWS[result["name"]]
            estimate = Estimate.of(torch.tensor(result["weighted"]))
            learned = row.noise == "variational"
            color = "#0072b2" if learned else "#d55e00"
            place = titles.index(row.title) + (0.12 if learned else -0.12)
            axes.errorbar(
                estimate.mean, place, xerr=estimate.standard_error, fmt="o", color=color, capsize=2, markersize=4,
                markerfacecolor=color if learned else "white",
            )  # fmt: skip
        for noise, color, face in (("uniform", "#d55e00", "white"), ("variational", "#0072b2", "#0072b2")):
            axes.plot([], [], "o", color=color, markerfacecolor=face, markersize=4, label=f"{noise} dequantization")
        axes.set_yticks(range(len(titles)), titles)
        axes.invert_yaxis()
        axes.set_xlabel("test bits/dim, importance-weighted; each run ± standard error")
        axes.grid(axis="x", linewidth=0.4, alpha=0.5)
        axes.legend(framealpha=1, edgecolor="none", loc="lower right")
        write_figure(figure, path, vector=True, dpi=200)


if __name__ == "__main__":
    main()
