"""Compiling kernels without a card: what launchers would run on one, and the resources that it would take.

The launchers run on tensors without storage and on a driver that only says which card it is.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

__all__ = ["TARGETS", "Launched", "Resources", "compile_only", "launches", "pretend", "resources"]

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


class Launched(NamedTuple):
    """A kernel as it was launched: what was compiled, the grid, and constants and options by name."""

    compiled: Any
    grid: tuple[int, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the kernel, as tables have it."""
        return self.compiled.metadata.name.removeprefix("_").removesuffix("_kernel")


def launches(target: GPUTarget, launch: Callable[[], object]) -> list[Launched]:
    """Compile what the launches in a function would run on a card of this kind, and run nothing."""
    found = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **options):
        found.append(Launched(run(self, *args, grid=grid, warmup=True, **options), grid, options))

    JITFunction.run = warm_up
    try:
        with pretend(target):
            launch()
    finally:
        JITFunction.run = run
    return found


def compile_only(target: GPUTarget, launch: Callable[[], object]) -> list:
    """Return what :func:`launches` compiles."""
    return [launched.compiled for launched in launches(target, launch)]


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
