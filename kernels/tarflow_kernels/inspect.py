"""What compilers make of the kernels, on a machine without a GPU: registers, spills, shared memory, instructions.

    python -m tarflow_kernels.inspect
    python -m tarflow_kernels.inspect --target sm_90 --op decode_attention

Compiles every kernel, as its launcher calls it and in the configurations for cards that nobody has tuned, for NVIDIA's
sm_80, sm_90 and sm_100 and AMD's gfx942. The launchers run on tensors without storage and on a driver that only says
which card it is.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .scales import EXP, clamp, sigmoid, softclip, softplus, tanh

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What multiplies matrices, the fastest first.
INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma")


class Resources(NamedTuple):
    """Of one compiled kernel."""

    registers: int
    """per thread; on AMD's cards vector registers"""
    spilled: int
    """bytes per thread on NVIDIA's cards, registers on AMD's"""
    shared: int
    """bytes per program"""
    instruction: str
    """the fastest matrix instruction in it, or a dash"""


class Case(NamedTuple):
    """A launch of one op on tensors of some shape and dtype."""

    op: str
    dtype: torch.dtype
    shape: str
    launch: Callable[[], object]


def cases() -> Iterator[Case]:
    """Every kernel in every variant that differs in more than a number."""
    for dtype in (torch.bfloat16, torch.float32):
        head_dims = (16, 32, 64, 128, 256) if dtype == torch.bfloat16 else (16, 32, 64, 128)
        for head_dim in head_dims:
            launch = functools.partial(_attend, dtype, 1024, head_dim)
            yield Case("causal_attention", dtype, f"N=1024 D={head_dim}", launch)
        for head_dim in (64, 128):
            for new, rows in ((1, 64), (64, 64), (1, 1)):
                launch = functools.partial(_decode, dtype, rows, new, head_dim)
                yield Case("decode_attention", dtype, f"B={rows} G={new} D={head_dim}", launch)
        for token_dim in (12, 48):
            yield Case("affine", dtype, f"N=1024 D={token_dim}", functools.partial(_affine, dtype, token_dim, EXP))
            yield Case("guided_affine", dtype, f"N=1024 D={token_dim}", functools.partial(_guide, dtype, token_dim))
            launch = functools.partial(_embed, dtype, token_dim)
            yield Case("embed_next", dtype, f"N=1024 D={token_dim} C=768", launch)
        for channels in (768, 8192):
            yield Case("residual_norm", dtype, f"B=64 C={channels}", functools.partial(_normalize, dtype, channels))
        for components, order in ((32, "elements"), (4, "elements"), (32, "components"), (4, "components")):
            launch = functools.partial(_mix, dtype, components, order)
            yield Case("mixture_logistic", dtype, f"N=1536 K={components} by {order}", launch)
    # A ragged end, padded heads, and sizes of one, which Triton compiles as constants.
    for dtype, length, head_dim in (
        (torch.bfloat16, 1000, 48),
        (torch.bfloat16, 1000, 96),
        (torch.float32, 1000, 96),
        (torch.bfloat16, 1, 16),
    ):
        shape = f"N={length} D={head_dim}"
        yield Case("causal_attention", dtype, shape, functools.partial(_attend, dtype, length, head_dim))
    yield Case("decode_attention", torch.bfloat16, "B=64 G=64 D=256", lambda: _decode(torch.bfloat16, 64, 64, 256))
    yield Case("embed_next", torch.float32, "N=64 D=256 C=100", lambda: _embed(torch.float32, 256, 64, 100))
    yield Case("affine", torch.float32, "N=1024 D=1", lambda: _affine(torch.float32, 1, EXP))
    yield Case("mixture_logistic", torch.float32, "N=1536 K=10 by components", lambda: _mix(torch.float32, 10))
    for scale in (softclip(5.0), softplus(), sigmoid(), clamp(-5.0, 3.0), tanh(2.0)):
        launch = functools.partial(_affine, torch.float32, 48, scale)
        yield Case("affine", torch.float32, f"N=1024 D=48 {scale.kind}", launch)


def _attend(dtype, length, head_dim):
    """As a fused projection gives queries, keys and values."""
    from .triton.attention import causal_attention_backward, causal_attention_forward

    q, k, v = _meta(4, length, 3, 12, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    temperature = _meta(4)
    out, lse = causal_attention_forward(q, k, v, temperature, 0.1)
    causal_attention_backward(out, q, k, v, out, lse, temperature, 0.1)


def _decode(dtype, rows, new, head_dim):
    from .triton.decode import decode_attention

    q, k, v = _meta(rows, new, 3, 12, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    caches = _meta(2, rows, 12, 1024, head_dim, dtype=dtype)
    decode_attention(q, k, v, *caches, _meta(rows, dtype=torch.int32), _meta(rows), 0.1)


def _affine(dtype, token_dim, scale):
    """Parameters are the halves of an output, and those of the token before."""
    from .triton.affine import affine_map, affine_map_backward

    x = _meta(4, 1024, token_dim)
    alpha, mu = _meta(4, 1024, 2 * token_dim, dtype=dtype).chunk(2, dim=-1)
    for inverse in (False, True):
        z, logdet = affine_map(x, mu, alpha, True, inverse, *scale)
        affine_map_backward(z, logdet, z, alpha, x.dtype, mu.dtype, True, inverse, *scale)


def _guide(dtype, token_dim):
    """One token of every row, with the reference branch behind the conditional one."""
    from .triton.affine import guided_affine_map

    tokens = _meta(4, 1024, token_dim)
    (alpha, mu), (alpha_ref, mu_ref) = (half.chunk(2, dim=-1) for half in _meta(8, 2 * token_dim, dtype=dtype).chunk(2))
    guided_affine_map(tokens[:, 3], mu, alpha, mu_ref, alpha_ref, None, 2.0, tokens[:, 3])


def _embed(dtype, token_dim, num_tokens=1024, channels=768):
    """With and without guidance, whose parameters are the quarters of an output."""
    from .triton.embed import embed_next

    x, z = _meta(2, 64, num_tokens, token_dim)
    (alpha, mu), (alpha_ref, mu_ref) = (
        half.chunk(2, dim=-1) for half in _meta(128, 2 * token_dim, dtype=dtype).chunk(2)
    )
    positions, projection, embedding = (
        _meta(64, dtype=torch.int32),
        _meta(token_dim, channels),
        _meta(num_tokens, channels),
    )
    for guidance, rows in (((None, None, None), 64), ((mu_ref, alpha_ref, _meta(num_tokens)), 128)):
        embed_next(x, z, mu, alpha, *guidance, positions, projection, embedding, _meta(rows, channels))


def _normalize(dtype, channels):
    """Behind a product in low precision and before another, and where there is nothing to add."""
    from .triton.norm import residual_norm

    h, weight = _meta(64, channels), _meta(channels)
    for delta in (_meta(64, channels, dtype=dtype), None):
        residual_norm(h, delta, weight, weight, 1e-5, dtype)


def _mix(dtype, components, order="components"):
    """Parameters as the parts of an output with two more channels, which come first, as in PyTorch, or last."""
    from .triton.mixture import mixture_map, mixture_map_backward

    channels = 3 * components + 2
    if order == "elements":
        x, outputs = _meta(4, 3, 32, 16), _meta(4, 3, channels, 32, 16, dtype=dtype).movedim(2, -1)
    else:
        x, outputs = _meta(4, 32, 16, 3), _meta(4, 32, 16, 3, channels, dtype=dtype)
    theta = outputs[..., 2:].chunk(3, dim=-1)
    for inverse in (False, True):
        out, logdet = mixture_map(x, *theta, -7.0, inverse)
        mixture_map_backward(out, logdet, out, *theta, x.dtype, -7.0, inverse)


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def inspect(target: str, case: Case) -> dict[str, Resources]:
    """Resources of the kernels that a case launches, by their names."""
    found = {}
    for compiled in compile_only(TARGETS[target], case.launch):
        kernel = compiled.metadata.name.removeprefix("_").removesuffix("_kernel")
        name = f"{kernel} {str(case.dtype).removeprefix('torch.')} {case.shape}"
        used = resources(compiled)
        found[name] = max(found.get(name, used), used)
    return found


def compile_only(target: GPUTarget, launch: Callable[[], object]) -> list:
    """What the launches in a function would run on a card of this kind."""
    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver = triton.runtime.driver
    previous, driver._active = driver._active, _Driver(target)
    JITFunction.run = warm_up
    try:
        launch()
    finally:
        JITFunction.run, driver._active = run, previous
    return compiled


class _Driver:
    """Of a card that is not there."""

    def __init__(self, target: GPUTarget):
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


def resources(compiled) -> Resources:
    """Read off the binary."""
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


def inspect_all(targets: list[str], ops: list[str], workers: int) -> dict[str, dict[str, Resources]]:
    """Resources by target and kernel, compiled by several processes."""
    chosen = [i for i, case in enumerate(cases()) if case.op in ops]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {target: [pool.submit(_inspect_case, target, i) for i in chosen] for target in targets}
        return {
            target: functools.reduce(dict.__or__, (job.result() for job in submitted), {})
            for target, submitted in jobs.items()
        }


def _inspect_case(target: str, index: int) -> dict[str, Resources]:
    from .triton import configs

    configs.device_name = lambda: None  # not what was tuned for a card that this machine may have
    return inspect(target, list(cases())[index])


def main(argv: list[str] | None = None) -> None:
    """Print a table for each target, or write all of them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="all of them, unless given")
    ops = sorted({case.op for case in cases()})
    parser.add_argument("--op", action="append", choices=ops, help="all of them, unless given")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--out", type=Path, help="write JSON to this file instead of printing")
    arguments = parser.parse_args(argv)
    table = inspect_all(arguments.target or list(TARGETS), arguments.op or ops, arguments.workers)
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
