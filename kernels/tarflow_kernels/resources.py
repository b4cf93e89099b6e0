"""Resources that the compiled kernels take, found without a GPU: registers, spills, shared memory, instructions.

    python -m tarflow_kernels.resources
    python -m tarflow_kernels.resources --target sm_90 --op decode_attention
    python -m tarflow_kernels.resources --model sm_90

Compiles every kernel, as its launcher calls it and in the configurations for cards that nobody has tuned, for NVIDIA's
sm_80, sm_90 and sm_100 and AMD's gfx942. With ``--model``, predicts from the machine code how long kernels would take
(:mod:`.predict`).
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from . import cases, predict
from .offline import TARGETS, Resources, compile_only, launches, resources
from .scales import EXP, Scale, clamp, sigmoid, softclip, softplus, tanh

__all__ = [
    "TARGETS",
    "Case",
    "Resources",
    "compile_only",
    "every_case",
    "main",
    "measure",
    "measure_all",
    "resources",
]


class Case(NamedTuple):
    """A row of the table: all launches of one op on tensors of some shape and dtype.

    Attributes:
        op: its name.
        dtype: of the parameters, or of queries, keys and values.
        shape: what the row of the table is called.
        launch: launches all kernels of the op.
    """

    op: str
    dtype: torch.dtype
    shape: str
    launch: Callable[[], object]


def every_case() -> Iterator[Case]:
    """Yield every kernel in every variant that differs in more than a number."""
    for dtype in (torch.bfloat16, torch.float32):
        head_dims = (16, 32, 64, 128, 256) if dtype == torch.bfloat16 else (16, 32, 64, 128)
        for head_dim in head_dims:
            yield _attention(dtype, 1024, head_dim)
        for head_dim in (64, 128):
            for new, rows in ((1, 64), (64, 64), (1, 1)):
                yield _decoding(dtype, rows, new, head_dim)
        for token_dim in (12, 48):
            yield _affine(dtype, token_dim)
            yield _embedding(dtype, 1024, token_dim, 768)
        for channels in (768, 8192):
            launches = [partial(cases.normalization, "meta", dtype, 64, channels, residual=r) for r in (True, False)]
            yield Case("residual_norm", dtype, f"B=64 C={channels}", partial(_launch, launches))
        for components, order in ((32, "elements"), (4, "elements"), (32, "components"), (4, "components")):
            yield _mixture(dtype, components, order)
    # A ragged end, padded heads, and sizes of one, which Triton compiles as constants.
    yield _attention(torch.bfloat16, 1000, 48)
    yield _attention(torch.bfloat16, 1000, 96)
    yield _attention(torch.float32, 1000, 96)
    yield _attention(torch.bfloat16, 1, 16)
    yield _decoding(torch.bfloat16, 64, 64, 256)
    yield _embedding(torch.float32, 64, 256, 100)
    yield _affine(torch.float32, 1)
    yield _mixture(torch.float32, 10, "components")
    for scale in (softclip(5.0), softplus(), sigmoid(), clamp(-5.0, 3.0), tanh(2.0)):
        yield _affine(torch.float32, 48, scale)


def _launch(builders: Sequence[Callable[[], object]]) -> None:
    """Build each case and launch it, forward and backward."""
    for build in builders:
        built = build()
        for launch in built if isinstance(built, tuple) else (built,):
            launch()


def _attention(dtype: torch.dtype, length: int, head_dim: int) -> Case:
    build = partial(cases.attention, "meta", dtype, 4, length, head_dim, tempered=True)
    return Case("causal_attention", dtype, f"N={length} D={head_dim}", partial(_launch, [build]))


def _decoding(dtype: torch.dtype, rows: int, new: int, head_dim: int) -> Case:
    build = partial(cases.decoding, "meta", dtype, rows, new, head_dim, tempered=True)
    return Case("decode_attention", dtype, f"B={rows} G={new} D={head_dim}", partial(_launch, [build]))


def _affine(dtype: torch.dtype, token_dim: int, scale: Scale = EXP) -> Case:
    builds = [partial(cases.affine, "meta", dtype, 4, 1024, token_dim, inverse=i, scale=scale) for i in (False, True)]
    shape = f"N=1024 D={token_dim}" if scale == EXP else f"N=1024 D={token_dim} {scale.kind}"
    return Case("affine", dtype, shape, partial(_launch, builds))


def _embedding(dtype: torch.dtype, length: int, token_dim: int, channels: int) -> Case:
    builds = [partial(cases.embedding, "meta", dtype, 64, length, token_dim, channels, guided=g) for g in (False, True)]
    return Case("embed_next", dtype, f"N={length} D={token_dim} C={channels}", partial(_launch, builds))


def _mixture(dtype: torch.dtype, components: int, order: str) -> Case:
    builds = [partial(cases.mixture, "meta", dtype, 4, components, order, inverse=i) for i in (False, True)]
    return Case("mixture_logistic", dtype, f"N=1536 K={components} by {order}", partial(_launch, builds))


def measure(target: str, case: Case) -> dict[str, Resources]:
    """Resources of the kernels that a case launches, by their names."""
    found: dict[str, Resources] = {}
    for launched in launches(TARGETS[target], case.launch):
        name = f"{launched.name} {str(case.dtype).removeprefix('torch.')} {case.shape}"
        used = resources(launched.compiled)
        found[name] = max(found.get(name, used), used)
    return found


def measure_all(targets: list[str], ops: list[str], workers: int) -> dict[str, dict[str, Resources]]:
    """Measure resources by target and kernel, compiled by several processes."""
    chosen = [i for i, case in enumerate(every_case()) if case.op in ops]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {target: [pool.submit(_measure_case, target, i) for i in chosen] for target in targets}
        return {
            target: functools.reduce(dict.__or__, (job.result() for job in submitted), {})
            for target, submitted in jobs.items()
        }


def _measure_case(target: str, index: int) -> dict[str, Resources]:
    _forget_tuning()
    return measure(target, list(every_case())[index])


def _forget_tuning() -> None:
    """Choose no configuration that was tuned for a card that this machine may have."""
    from .triton import configs

    configs.device_name = lambda: None  # type: ignore[assignment]


def main(argv: list[str] | None = None) -> None:
    """Print a table for each target or the predictions of the model, or write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="all of them, unless given")
    ops = sorted({case.op for case in every_case()})
    parser.add_argument("--op", action="append", choices=ops, help="all of them, unless given")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--model", choices=["sm_90"], help="predict times on this target")
    parser.add_argument("--out", type=Path, help="write JSON to this file instead of printing")
    arguments = parser.parse_args(argv)
    if arguments.model:
        _forget_tuning()
        predictions = {row.name: predict.predict(row) for row in predict.rows()}
        _write_or_print(arguments.out, {"predictions": predict.as_json(predictions)}, predict.show(predictions))
    else:
        table = measure_all(arguments.target or list(TARGETS), arguments.op or ops, arguments.workers)
        _write_or_print(arguments.out, {"resources": table}, _show(table))


def _write_or_print(out: Path | None, found: dict, lines: Iterable[str]) -> None:
    if out:
        out.write_text(json.dumps({"triton": triton.__version__, **found}, indent=1) + "\n")
    else:
        print("\n".join(lines))


def _show(table: dict[str, dict[str, Resources]]) -> Iterator[str]:
    width = max(len(name) for rows in table.values() for name in rows)
    for target, rows in table.items():
        title = f"{target}, triton {triton.__version__}"
        yield f"{title:{width}}{'registers':>11}{'spilled':>9}{'shared':>9}  matrix"
        for name, row in rows.items():
            yield f"{name:{width}}{row.registers:11}{row.spilled:9}{row.shared:9}  {row.instruction}"


if __name__ == "__main__":
    main()
