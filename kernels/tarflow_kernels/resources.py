"""Resources that the compiled kernels take, found without a GPU: registers, spills, shared memory, instructions.

    python -m tarflow_kernels.resources
    python -m tarflow_kernels.resources --target sm_90 --op decode_attention

Compiles every kernel, as its launcher calls it and in the configurations for cards that nobody has tuned, for NVIDIA's
sm_80, sm_90 and sm_100 and AMD's gfx942. The launchers run on tensors without storage and on a driver that only says
which card it is.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import cases
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
    "pretend",
    "resources",
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Instructions that multiply matrices, the fastest first.
INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma")


class Resources(NamedTuple):
    """The resources of one compiled kernel.

    Attributes:
        registers: per thread; on AMD's cards vector registers.
        spilled: bytes per thread on NVIDIA's cards, registers on AMD's.
        shared: bytes of shared memory per program.
        instruction: the fastest matrix instruction in it, or a dash.
    """

    registers: int
    spilled: int
    shared: int
    instruction: str


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
    for compiled in compile_only(TARGETS[target], case.launch):
        kernel = compiled.metadata.name.removeprefix("_").removesuffix("_kernel")
        name = f"{kernel} {str(case.dtype).removeprefix('torch.')} {case.shape}"
        used = resources(compiled)
        found[name] = max(found.get(name, used), used)
    return found


def compile_only(target: GPUTarget, launch: Callable[[], object]) -> list:
    """Compile what the launches in a function would run on a card of this kind, and run nothing."""
    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = warm_up
    try:
        with pretend(target):
            launch()
    finally:
        JITFunction.run = run
    return compiled


@contextlib.contextmanager
def pretend(target: GPUTarget) -> Iterator[None]:
    """Let Triton believe, inside the ``with`` block, that this machine has a card of this kind."""
    driver = triton.runtime.driver
    previous, driver._active = driver._active, _Driver(target)
    try:
        yield
    finally:
        driver._active = previous


class _Driver:
    """The driver of a card that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # kernels are cached by device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"multiprocessor_count": 132}


def resources(compiled: Any) -> Resources:
    """Read the resources of a compiled kernel off its binary."""
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    instruction = next((name for name in INSTRUCTIONS if name in assembly), "-")
    if "cubin" in compiled.asm:
        usage = _cuobjdump(compiled.asm["cubin"])
        return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, instruction)
    count = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    spilled = count["vgpr_spill_count"] + count["sgpr_spill_count"]
    return Resources(count["vgpr_count"], spilled, compiled.metadata.shared, instruction)


def _cuobjdump(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}


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
    from .triton import configs

    configs.device_name = lambda: None  # type: ignore[assignment]  # not what was tuned for a card that this machine may have
    return measure(target, list(every_case())[index])


def main(argv: list[str] | None = None) -> None:
    """Print a table for each target, or write all of them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="all of them, unless given")
    ops = sorted({case.op for case in every_case()})
    parser.add_argument("--op", action="append", choices=ops, help="all of them, unless given")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--out", type=Path, help="write JSON to this file instead of printing")
    arguments = parser.parse_args(argv)
    table = measure_all(arguments.target or list(TARGETS), arguments.op or ops, arguments.workers)
    if arguments.out:
        arguments.out.write_text(json.dumps({"triton": triton.__version__, "resources": table}, indent=1) + "\n")
        return
    width = max(len(name) for rows in table.values() for name in rows)
    for target, rows in table.items():
        print(
            f"{target + ', triton ' + triton.__version__:{width}}{'registers':>11}{'spilled':>9}{'shared':>9}  matrix"
        )
        for name, row in rows.items():
            print(f"{name:{width}}{row.registers:11}{row.spilled:9}{row.shared:9}  {row.instruction}")


if __name__ == "__main__":
    main()
