"""Search for the recipe that draws the best samples for its time: train by named recipes, and score what they reach.

    python studies/recipe.py NAME ... --steps 2200 --seeds 0 1 2      train and score these; all of them without a name
    python studies/recipe.py --add NAME "--optimizer muon ..."        one more, in flags of `tarflow train`
    python studies/recipe.py --table                                  what is in studies/results/recipes/ so far

A recipe is what it changes in the default of `tarflow train`. All see the same images in the same order by their seed,
and are scored alike: bits/dim of 1,000 test images with the Gaussian noise of training, the same noise for all, and,
with ``--samples N``, what `tarflow evaluate --samples N` says of N samples with the guidance of the run. A result that
is there is not made again, and a run that was interrupted goes on.

Seconds are those of one process on ``--threads`` threads. They compare only where the machine did nothing else: a
result says whether its load was that of this process alone.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tarflow import ImageFlow, datasets
from tarflow.cli.train import read_flags
from tarflow.evaluation import noisy_bits_per_dim
from tarflow.files import atomic_write
from tarflow.training.config import TrainConfig
from tarflow.training.run import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results" / "recipes"
NUM_IMAGES = 1000
# Pictures and calibration take time that is none of the recipe's.
COMMON = "--sample-every 1000000000 --no-calibrate"

MUON = "--optimizer muon"
RECIPES = {
    "default": "",
    "adamw-5e-4": "--learning-rate 5e-4",
    "adamw-2e-3": "--learning-rate 2e-3",
    "adamw-4e-3": "--learning-rate 4e-3",
    "adamw-2e-3-beta2-0.99": "--learning-rate 2e-3 --beta2 0.99",
    "adamw-2e-3-batch-32": "--learning-rate 2e-3 --batch-size 32",
    "muon-5e-4": f"{MUON} --learning-rate 5e-4",
    "muon-1e-3": MUON,
    "muon-2e-3": f"{MUON} --learning-rate 2e-3",
    "muon-4e-3": f"{MUON} --learning-rate 4e-3",
    "muon-2e-3-decay-0.1": f"{MUON} --learning-rate 2e-3 --weight-decay 0.1",
    "muon-2e-3-batch-8": f"{MUON} --learning-rate 2e-3 --batch-size 8",
    "muon-2e-3-batch-32": f"{MUON} --learning-rate 2e-3 --batch-size 32",
    "muon-2e-3-ema-0.99": f"{MUON} --learning-rate 2e-3 --ema-decay 0.99",
    "muon-2e-3-ema-0.995": f"{MUON} --learning-rate 2e-3 --ema-decay 0.995",
    "muon-2e-3-constant": f"{MUON} --learning-rate 2e-3 --schedule constant",
    "muon-2e-3-warmup-20": f"{MUON} --learning-rate 2e-3 --warmup-steps 20",
    "muon-2e-3-clip-10": f"{MUON} --learning-rate 2e-3 --gradient-clip 10",
    "muon-2e-3-width-192": f"{MUON} --learning-rate 2e-3 --channels 192",
    "muon-2e-3-width-64": f"{MUON} --learning-rate 2e-3 --channels 64",
    "muon-2e-3-6-blocks": f"{MUON} --learning-rate 2e-3 --num-blocks 6",
    "muon-2e-3-2-blocks-of-4": f"{MUON} --learning-rate 2e-3 --num-blocks 2 --layers-per-block 4",
    "muon-2e-3-sigma-0.05": f"{MUON} --learning-rate 2e-3 --sigma 0.05",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the recipes that the command line names, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--add", nargs=2, action="append", default=[], metavar=("NAME", "FLAGS"))
    parser.add_argument("--steps", type=int, default=TrainConfig().training.max_steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=0, help="samples to score; 0 for none")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    command = parser.parse_args(arguments)
    recipes = RECIPES | dict(command.add)
    if unknown := [name for name in command.names if name not in recipes]:
        parser.error(f"NAME: expected {', '.join(recipes)}; got {', '.join(unknown)}")
    torch.set_num_threads(command.threads)
    names = command.names or [name for name, _ in command.add] or list(RECIPES)
    for seed in command.seeds:
        for name in [] if command.table else names:
            run(name, recipes[name], command.steps, seed, command.samples, command.out)
    print(table())


def run(name: str, flags: str, steps: int, seed: int, samples: int, out: Path) -> None:
    """Train by a recipe, score it, and write the result to ``results/recipes/``, if it is not there."""
    folder = out / f"{name}-{steps}-{seed}"
    result_path = RESULTS / f"{folder.name}.json"
    if result_path.exists():
        return
    settings, _ = read_flags([*shlex.split(f"{flags} {COMMON}"), f"--max-steps={steps}", f"--seed={seed}"])
    config = settings.config
    begun, before, began = folder.exists(), _load(), time.perf_counter()
    model = train(config, folder, resume=begun)
    seconds, threads = time.perf_counter() - began, torch.get_num_threads()
    result = {
        "name": name,
        "flags": flags,
        "steps": steps,
        "seed": seed,
        "images": steps * config.training.batch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": None if begun else round(seconds, 1),
        "seconds_comparable": not begun and max(before, _load()) <= threads + 0.5,
        "threads": threads,
        "device": str(model.device),
        "torch": torch.__version__,
        **bits(model, config),
        "curve": curve(folder),
        "samples": score_samples(folder, config, samples) if samples else None,
        "config": asdict(config),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with atomic_write(result_path) as path:
        path.write_text(json.dumps(result, default=str, indent=1) + "\n")


def bits(model: ImageFlow, config: TrainConfig) -> dict[str, Any]:
    """Score bits/dim of noisy test images, with the same noise whatever the recipe and its seed."""
    test = datasets.load(config.data.dataset, "test", config.data.data_dir)
    pixels, labels = test.get_batch(datasets.evenly_spaced(len(test), NUM_IMAGES))
    generator = torch.Generator(model.device).manual_seed(0)
    given = labels if config.data.conditional else None
    estimate = noisy_bits_per_dim(model, pixels, given, config.training.sigma, generator=generator)
    return {"data": test.source, "noisy_bits_per_dim": asdict(estimate), "sigma": config.training.sigma}


def curve(folder: Path) -> list[tuple[int, float]]:
    """Read the bits/dim of the evaluations on the way, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["eval_bits_per_dim"]) for row in rows if "eval_bits_per_dim" in row]


def score_samples(folder: Path, config: TrainConfig, samples: int) -> dict[str, Any]:
    """Return what ``tarflow evaluate`` writes about samples of a run, or why it does not."""
    guidance = config.sample_guidance.weight if config.sample_guidance else 0
    flags = [f"--samples={samples}", f"--guidance={guidance}", "--num-images=100", "--importance-samples=1"]
    command = [sys.executable, str(ROOT / "train.py"), "evaluate", str(folder), *flags]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=os.environ | threads)
    if ended.returncode:
        *_, reason = ended.stderr.splitlines() or [f"exit status {ended.returncode}"]
        return {"unavailable": reason}
    return json.loads((folder / "evaluation.json").read_text())["samples"]


def table() -> str:
    """Make a Markdown table of all results, the best bits/dim of each number of steps first."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    results.sort(key=lambda result: (result["steps"], result["noisy_bits_per_dim"]["mean"]))
    lines = [
        "| recipe | steps, seed | noisy bits/dim (sigma) | samples | seconds, threads |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        estimate, seconds = result["noisy_bits_per_dim"], result["seconds"]
        scores = (result["samples"] or {}).get("scores", {})
        said = "; ".join(f"{name}: {score:.4g}" for name, score in scores.items()) or "not scored"
        taken = "interrupted" if seconds is None else f"{seconds:.0f}"
        shared = "" if result["seconds_comparable"] or seconds is None else ", not comparable: a shared machine"
        lines.append(
            f"| `{result['name']}` | {result['steps']:,}, {result['seed']} "
            f"| {estimate['mean']:.4f} ± {estimate['standard_error']:.4f} ({result['sigma']}) "
            f"| {said} | {taken}, {result['threads']}{shared} |"
        )
    return "\n".join(lines)


def _load() -> float:
    """The average number of processes that ran in the last minute."""
    return os.getloadavg()[0]


if __name__ == "__main__":
    main()
