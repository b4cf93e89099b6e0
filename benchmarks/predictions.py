"""Write the page of predictions, ``docs/predictions.md``, and its plots.

    python benchmarks/predictions.py

The page is put together from :data:`SECTIONS`, functions that return markdown.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import cost
import models
import plots
import records
from cost import DEVICES, Device, Shares
from records import three_digits
from report import KERNELS, table
from tarflow import TarFlowConfig
from tarflow.files import atomic_write
from tarflow.training.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]

INTRODUCTION = """# These are predictions: nothing on this page was measured on a GPU

`python benchmarks/predictions.py` writes this page. What was measured is in [benchmarks.md](benchmarks.md), which shows
prediction and measurement side by side once a card has been measured."""
BATCHES = (1, 8, 32, 128, 256)
BRANCHES = {"guided": 2, "not guided": 1}
OPS = {2: "guided sampling", 1: "sampling without guidance"}
SHARES = (0.05, 0.1, 0.2)
LARGE = "ImageNet64 2-768-8-8"
# Of the published code, on an A100: a guided batch, and seconds.
REPORTED = {LARGE: (32, 120.0)}


def main() -> None:
    """Write the page, draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page and the plots")
    docs = parser.parse_args().docs
    docs.mkdir(parents=True, exist_ok=True)
    with atomic_write(docs / "predictions.md") as beside:
        beside.write_text("\n\n".join([INTRODUCTION, *(section() for section in SECTIONS)]) + "\n")
    draw_decoding(docs / "predicted-decoding.png")
    if cost.CHECK.exists():
        checked = json.loads(cost.CHECK.read_text())
        plots.agreement(checked["points"], checked["machine"]["device"], docs / "predicted-check.png")


# Decoding -------------------------------------------------------------------------------------------------------------


def families() -> dict[str, tuple[TarFlowConfig, list[str]]]:
    """Return the TarFlows of like blocks that differ in tokens, width, blocks or layers, with the presets of each."""
    found: dict[tuple[int, ...], tuple[TarFlowConfig, list[str]]] = {}
    for preset, settings in PRESETS.items():
        config = settings.model
        if isinstance(config, TarFlowConfig) and isinstance(config.layers_per_block, int):
            shape = config.num_tokens, config.channels, config.num_blocks, config.layers_per_block
            found.setdefault(shape, (config, []))[1].append(preset)
    return {_name(config): (config, presets) for config, presets in found.values()}


@functools.cache
def measured_shares(branches: int) -> dict[int | None, Shares]:
    """Return the passes of the trained model, as shares of the steps, by window; measured with 16 samples on a CPU."""
    name = f"{OPS[branches]}, Fashion-MNIST 2-128-4-2, trained, B=16 N=196, float32"
    rows = [rows[name] for path in records.FOLDER.glob("*.json") if name in (rows := records.load(path)["rows"])]
    contenders, shares = rows[0]["contenders"], {}
    for window, contender in {None: "jacobi", 64: "jacobi, window 64"}.items():
        counts = [map(int, block.split("/")) for block in contenders[contender]["by_block"]]
        first, *others = (passes / steps for passes, steps in counts)
        shares[window] = first, sum(others) / len(others)
    return shares


def predict(config: TarFlowConfig, batch: int, branches: int, device: Device) -> dict[str, float]:
    """Predict the seconds of every decoder, with the shares that were measured, and the limit."""
    shares = measured_shares(branches)
    return {
        "limit": cost.floor(config, batch, branches, device),
        "sequential": cost.sequential(config, batch, branches, device),
        "jacobi": cost.jacobi(config, batch, branches, None, shares[None], device),
        "jacobi, window 64": cost.jacobi(config, batch, branches, 64, shares[64], device),
        "auto": cost.auto(config, batch, branches, shares, device),
    }


def decoding() -> str:
    """Write the section on decoding."""
    return "\n\n".join([_assumptions(), *_tables(), _sensitivity()])


def draw_decoding(path: Path) -> None:
    """Plot the time per image of guided sampling over the batch, on the first of the devices."""
    title, device = next(iter(DEVICES.items()))
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for name, (config, _) in families().items():
        panels[name] = {}
        for batch in (2**power for power in range(9)):
            for decoder, taken in predict(config, batch, 2, device).items():
                panels[name].setdefault(decoder, {})[batch] = taken / batch
    reported = {name: (batch, taken / batch) for name, (batch, taken) in REPORTED.items()}
    plots.prediction(panels, reported, f"Predicted, not measured: guided sampling, bfloat16, {title}", path)


def _assumptions() -> str:
    config, h100 = models.imagenet64(), DEVICES["H100 SXM"]
    steps = config.num_blocks * (config.num_tokens - 1)
    times = (
        cost.floor(config, 32, 2, h100) / steps,
        cost.step_seconds(config, 32, 2, replace(h100, streams=1)),
        cost.step_seconds(config, 32, 2, h100),
    )
    limit, chain, halves = (f"{1e6 * taken:.0f} us" for taken in times)
    return f"""## Decoding

How long it takes to sample by the sequential decoder, by the Jacobi decoder and by `auto`, the better of them for each
block, in bfloat16. The model is [`benchmarks/cost.py`](../benchmarks/cost.py): a kernel takes some time for being
launched, and beside it that of moving its bytes or that of multiplying, whichever is longer. What it leaves out stands
there too, such as capturing the graph of a block, which a small model would notice most. Flow++, which has no tokens to
wait for, is not here. The constants are assumptions:

{table(("constant", *DEVICES, "source"), _constants())}

*Limit*: weights and cache of every step of the sequential decoder, each read once, at the assumed copy rate. A parallel
pass reads them for many tokens, and may go beyond. *Halves*: a large batch is decoded as two halves on two streams,
without which it is *one chain*; `auto` chooses between halves, where there are any, and Jacobi. A step of {LARGE}
for 32 guided samples on an H100, for example: limit {limit}, one chain {chain}, halves {halves}.

*Passes.* How many the Jacobi decoder takes depends on trained weights. Assumed are the shares of the steps that the
trained model of Fashion-MNIST took for 16 samples on a CPU ([rows](benchmarks.md#sampling)). Other models, longer
sequences and larger batches have others.

{table(("passes over steps", "block generated first", "each other block"), _passes())}

*Published code.* Two minutes for 32 guided images of 64 x 64 on an A100 is the time that is quoted of the TarFlow paper
(arXiv 2412.06329), here at second hand. GS-Jacobi (arXiv 2505.12849) reports gains over the published code of 4.53x
(ImageNet128), 5.32x (AFHQ), 2.96x and 2.51x (ImageNet64, without and with classes).

<img src="predicted-decoding.png" width="720" alt="predicted seconds per image over batch, by decoder">"""


def _constants() -> Iterator[list[str]]:
    shown = {
        "copy": ("copy rate", 1e-12, "TB/s"),
        "matrix": ("products in bfloat16", 1e-12, "TFLOP/s"),
        "launch": ("a kernel, beside its bytes and operations", 1e6, "us"),
        "processors": ("multiprocessors", 1, ""),
    }
    for field, (name, scale, unit) in shown.items():
        values = (f"{scale * getattr(device, field):.3g} {unit}".strip() for device in DEVICES.values())
        yield [name, *values, cost.SOURCES[field]]


def _passes() -> Iterator[list[str]]:
    for guided, branches in BRANCHES.items():
        for window, shares in measured_shares(branches).items():
            windows = "whole sequences" if window is None else f"windows of {window}"
            yield [f"{windows}, {guided}", *(f"{share:.1%}" for share in shares)]


def _tables() -> Iterator[str]:
    """Write a table for each family and device."""
    head = ("batch", "limit", "one chain", "halves", "Jacobi", "Jacobi, window 64", "auto", "auto, per image")
    for title, device in DEVICES.items():
        for name, (config, presets) in families().items():
            yield f"### {name}, {title}"
            yield f"Presets: {', '.join(presets)}.{_wider(presets, config, device)}"
            published = ("published code",) * (name in REPORTED)
            yield table((*head, *published), _lines(name, config, device))


def _lines(name: str, config: TarFlowConfig, device: Device) -> Iterator[list[str]]:
    for guided, branches in BRANCHES.items():
        for batch in BATCHES:
            limit, sequential, *parallel, auto = predict(config, batch, branches, device).values()
            chain = cost.sequential(config, batch, branches, replace(device, streams=1))
            halves = _seconds(sequential) if cost.in_halves(config, batch, branches) else "–"
            cells = [_seconds(limit), _seconds(chain), halves, *map(_seconds, (*parallel, auto, auto / batch))]
            if name in REPORTED:
                reported = branches == 2 and batch == REPORTED[name][0]
                cells.append(f"about {REPORTED[name][1]:.0f} s (A100)" if reported else "–")
            yield [f"{batch}, {guided}", *cells]


def _sensitivity() -> str:
    """Write what follows from other numbers of passes, in all blocks alike, and from which number on Jacobi loses."""
    title, device = next(iter(DEVICES.items()))
    config, _ = families()[LARGE]
    shares, windows = [f"{share:.0%}" for share in SHARES], {"Jacobi": None, "window 64": 64}
    head = ("batch", "sequential", *(f"{name}, {share}" for name in windows for share in (*shares, "even")))
    lines = []
    for batch in BATCHES:
        cells = [f"{batch}, guided", _seconds(cost.sequential(config, batch, 2, device))]
        for window in windows.values():
            cells += [_seconds(cost.jacobi(config, batch, 2, window, (share, share), device)) for share in SHARES]
            parallel = cost.seconds(cost.jacobi_pass(config, batch, 2, window, device), device)
            cells.append(f"{cost.step_seconds(config, batch, 2, device) / parallel:.1%}")
        lines.append(cells)
    return f"""### If the passes were others

{LARGE}, {title}: Jacobi with passes of {", ".join(shares)} of the steps in all blocks alike, and, *even*, the share
at which it takes as long as the sequential decoder.

{table(head, lines)}"""


def _name(config: TarFlowConfig) -> str:
    data = "Fashion-MNIST" if config.in_channels == 1 else f"ImageNet{config.image_size}"
    return f"{data} {config.patch_size}-{config.channels}-{config.num_blocks}-{config.layers_per_block}"


def _wider(presets: list[str], config: TarFlowConfig, device: Device) -> str:
    """Say what tokens that are wider than those of the table's configuration add at most."""
    added = max(
        cost.step_seconds(PRESETS[preset].model, batch, 2, device) / cost.step_seconds(config, batch, 2, device) - 1
        for preset in presets
        for batch in BATCHES
    )
    return f" A step of those with wider tokens takes up to {added:.1%} longer." if added else ""


def _seconds(taken: float) -> str:
    return f"{three_digits(taken)} s" if taken >= 1 else f"{three_digits(1e3 * taken)} ms"


# Kernels --------------------------------------------------------------------------------------------------------------


def kernels() -> str:
    """Write the section on kernels, of what the static model says of their machine code."""
    table_of = json.loads(KERNELS.read_text())
    lines = []
    for name, row in table_of["predictions"].items():
        cells = [
            name,
            f"{row['microseconds']:.1f} us",
            f"{100 * row['limit'] / row['microseconds']:.0f} % ({row['bound']})",
        ]
        for kernel, facts in row["kernels"].items():
            busiest = ", ".join(f"{pipe} {percent} %" for pipe, percent in list(facts["busy"].items())[:2])
            spilled = f", {facts['spilled']} bytes spilled" * (facts["spilled"] > 0)
            lines.append([*cells, kernel, f"{facts['microseconds']:.1f} us", f"{facts['programs']}{spilled}", busiest])
            cells = [""] * 3
    head = ("", "predicted", "of the limit", "kernel", "predicted", "programs at a time", "busiest")
    return f"""## Kernels

How long our kernels would take on an H100, read from the machine code that Triton {table_of["triton"]} makes for sm_90:
a [static model](../kernels/tarflow_kernels/hopper.py) of a multiprocessor goes through it instruction by instruction.
`python -m tarflow_kernels.resources --model sm_90` prints this with the instructions of each loop; a test compares it
with the committed table. Of the L2 and the memory the model knows a bandwidth and a latency, of contention nothing: it
is optimistic by 10 to 60 %, and there to compare two versions of a kernel. A limit is that of the bytes or operations
of an op at the rates that the model assumes. The gradients of attention take two kernels, which move twelve tensors
where the op has eight.

{table(head, lines)}"""


# Check ----------------------------------------------------------------------------------------------------------------


def cpu_check() -> str:
    """Write the section on the check of the formulas against a CPU."""
    text = """## The formulas, checked on a CPU

`python benchmarks/cost.py --check` measures the copy rate, the matrix rate and the time of a launch of a CPU, predicts
with them, by the same formulas, how long the decoders take on small models there, and measures that. One size is varied
at a time. Where the formulas hold, measured times grow as predicted ones do: the slope of log measured over log
predicted is 1. The factor is the geometric mean of measured over predicted."""
    if not cost.CHECK.exists():
        return f"{text} No CPU has been measured yet."
    checked = json.loads(cost.CHECK.read_text())
    machine, constants, points = checked["machine"], checked["constants"], checked["points"]
    where = (
        f"{machine['device']}, {machine['driver']}, torch {machine['torch']}, commit {machine['commit']}: copy "
        f"{constants['copy'] / 1e9:.3g} GB/s, products {constants['matrix'] / 1e12:.3g} TFLOP/s in float32, a launch "
        f"{1e6 * constants['launch']:.3g} us. Slope and factor over all {len(points)} points: {_fit(points)}."
    )
    varied, decoders = (list(dict.fromkeys(point[key] for point in points)) for key in ("varied", "decoder"))
    lines = [
        [size, *(_fit([p for p in points if (p["varied"], p["decoder"]) == (size, name)]) for name in decoders)]
        for size in varied
    ]
    lines.append(["all", *(_fit([p for p in points if p["decoder"] == name]) for name in decoders)])
    fits = table(("slope and factor, with varied", *decoders), lines)
    plot = '<img src="predicted-check.png" width="460" alt="measured over predicted times of the decoders on a CPU">'
    return "\n\n".join([text, where, fits, plot])


def _fit(points: list[records.Record]) -> str:
    return "{:.2f}, {:.2f}".format(*cost.fit(points))


SECTIONS = (kernels, decoding, cpu_check)

if __name__ == "__main__":
    main()
