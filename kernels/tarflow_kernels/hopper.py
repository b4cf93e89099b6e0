"""A static model of an H100: machine code in, time out. What it says is a prediction; nothing in it was measured here.

One of the four partitions of a multiprocessor is simulated, since the four run alike: a group of four warps has one on
each. Warps issue in order, at most one instruction per cycle in all, the one that can go first. An instruction waits
for the stall count of the one before it, for the scoreboards that its control code names, and for its pipe. Loads and
stores share the bandwidth of the L2, and loads take its latency or, where nobody has read before what a kernel reads,
that of the memory. A whole kernel is the programs that one multiprocessor gets, as many at a time as fit.

Throughputs are those of the CUDA programming guide (arithmetic per multiprocessor, compute capability 9.0), latencies
those of published microbenchmarks, both rounded. These numbers were held against a card once: with them Triton's
fused-attention tutorial (causal, heads of 64, 16k tokens) comes to 408 TFLOP/s, where the authors of FlashAttention-3
measured 363 (arXiv 2407.08608). Absolute times are optimistic by 10 to 60 %; what the model is for is to compare two
versions of a kernel.
"""

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import triton

__all__ = ["Instruction", "Loop", "Simulation", "Trips", "disassemble", "find_loops", "occupancy", "simulate", "unroll"]

MULTIPROCESSORS = 132
CLOCK = 1.65e9
"""Cycles per second under load."""
COPY_RATE = 3.0e12
"""Bytes read and written per second by a large copy."""
MATRIX_RATE = 2 * 2048 * MULTIPROCESSORS * CLOCK
"""Operations per second of bfloat16 products: 2048 multiply-adds per cycle and multiprocessor."""
L2_BYTES = 28.0
"""Bytes per cycle that the L2 gives one multiprocessor."""
L2_LATENCY, MEMORY_LATENCY = 300, 700

BARRIER, FENCE, ARRIVE = 24, 20, 4
MATRIX_LATENCY = 30  # from the end of a product in the tensor cores to its registers
LAUNCH = 200  # from the end of a program to the first instruction of the next in its place


class Unit(NamedTuple):
    """The pipe that an instruction occupies, for how many cycles of a partition, and when its result is there."""

    pipe: str
    cycles: int
    latency: int


_UNITS = {
    "FFMA FMUL FADD FSWZADD HFMA2 HADD2 HMUL2 HSETP2": Unit("fma", 1, 6),
    "IMAD IMUL IDP": Unit("fma", 2, 6),
    "MUFU F2F F2I I2F FRND": Unit("special", 8, 20),
    "FMNMX FSEL FSETP FSET FCHK F2FP I2FP IADD3 IADD LOP3 SHF SEL ISETP LEA PRMT IMNMX VIMNMX PLOP3 IABS BMSK SGXT FLO "
    "POPC VIADD MOV P2R R2P CS2R VOTE VIADDMNMX BREV": Unit("alu", 2, 6),
    "SHFL": Unit("memory", 4, 24),
    "LDS LDSM": Unit("memory", 4, 30),
    "STS STSM STG ST": Unit("memory", 4, 20),
    "LDG LD": Unit("memory", 4, MEMORY_LATENCY),
    "LDGSTS": Unit("memory", 4, 0),
    "LDL STL": Unit("memory", 4, 40),
    "ATOM ATOMG ATOMS RED REDG": Unit("memory", 8, 700),
    "HMMA": Unit("tensor", 8, 33),
    "LDC ULDC": Unit("", 1, 30),
    "S2R S2UR R2UR": Unit("", 1, 14),
}
UNITS = {name: unit for names, unit in _UNITS.items() for name in names.split()}
OTHER = Unit("", 1, 12)  # uniform arithmetic, branches, barriers


class Instruction(NamedTuple):
    """One instruction and its control code.

    Attributes:
        address, predicate, opcode, arguments: as ``nvdisasm`` prints them.
        stall: cycles until the warp may issue the next.
        sets, frees: scoreboards that are up until its result is there, and until its operands are read; or None.
        waits: scoreboards that must be down.
        target: the address that it branches to, or None.
    """

    address: int
    predicate: str
    opcode: str
    arguments: str
    stall: int
    sets: int | None
    frees: int | None
    waits: tuple[int, ...]
    target: int | None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


# Reading machine code -------------------------------------------------------------------------------------------------

_LINE = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:(@\S+) )?\s*(\S+)(.*?);\s*/\* 0x[0-9a-f]+ \*/\s*/\* (0x[0-9a-f]+) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+):\s*\n\s+/\*([0-9a-f]+)\*/", re.MULTILINE)


def disassemble(cubin: bytes) -> list[Instruction]:
    """Read the instructions of a compiled kernel, with the disassembler that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels = {label: int(address, 16) for label, address in _LABEL.findall(text)}
    return [_decode(labels, *match) for match in _LINE.findall(text)]


def _decode(
    labels: dict[str, int], address: str, predicate: str, opcode: str, arguments: str, control: str
) -> Instruction:
    bits = int(control, 16) >> 41
    sets, frees = (None if (bits >> at) % 8 == 7 else (bits >> at) % 8 for at in (5, 8))
    waits = tuple(board for board in range(6) if bits >> (11 + board) & 1)
    label = re.search(r"`\((\.L_x_\d+)\)", arguments)
    target = labels.get(label[1]) if label and opcode.startswith("BRA") else None
    return Instruction(int(address, 16), predicate, opcode, arguments, max(bits % 16, 1), sets, frees, waits, target)


class Loop(NamedTuple):
    """The indices of the first and the last instruction of a loop."""

    first: int
    last: int


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """Find the conditional branches that go back, in the order of where they go; spinning on a barrier is no loop."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code):
        if instruction.predicate and instruction.target is not None and instruction.target <= instruction.address:
            first = index[instruction.target]
            if i - first >= 4:
                ends[first] = max(ends.get(first, 0), i)
    return [Loop(first, ends[first]) for first in sorted(ends)]


class Trips(NamedTuple):
    """How many times a program goes through a loop, and how many of these, the last ones, through its optional part."""

    times: int
    optional: int = 0


def unroll(code: Sequence[Instruction], trips: Sequence[Trips]) -> list[int]:
    """List the indices of the instructions that a program executes, given its trips through each loop.

    Of two ways forward it takes the one with more products, then stores; but not to subroutines, which handle operands
    that are rare.

    Raises:
        ValueError: another number of trips than the code has loops.
    """
    loops, index = find_loops(code), {instruction.address: i for i, instruction in enumerate(code)}
    if len(loops) != len(trips):
        raise ValueError(f"trips: expected one for each of {len(loops)} loops; got {len(trips)}")
    ends = {loop.last: number for number, loop in enumerate(loops)}
    within = {i: number for number, loop in enumerate(loops) for i in range(loop.first, loop.last + 1)}
    jumps = _jumps(code, loops, trips, index)
    done, path, i = Counter[int](), list[int](), 0
    while i < len(code):
        path.append(i)
        instruction, number = code[i], within.get(i, -1)
        if instruction.name == "EXIT" and not instruction.predicate:
            break
        if i in ends:
            number = ends[i]
            done[number] = (done[number] + 1) % trips[number].times
            i = loops[number].first if done[number] else i + 1
        elif i in jumps:
            target, jump = jumps[i]
            if instruction.predicate and number >= 0 and within.get(target) == number:
                jump = done[number] < trips[number].times - trips[number].optional
            i = target if jump else i + 1
        else:
            i += 1
    return path


def _jumps(
    code: Sequence[Instruction], loops: Sequence[Loop], trips: Sequence[Trips], index: dict[int, int]
) -> dict[int, tuple[int, bool]]:
    """Find where each branch forward goes, and whether it is taken: where that way has more to do."""
    worth = [_WORTH.get(instruction.name, 0.0) for instruction in code]
    for loop, (times, _) in zip(loops, trips, strict=True):
        if not times:
            worth[loop.first : loop.last + 1] = [-1e3] * (loop.last + 1 - loop.first)
    best, jumps = [0.0] * (len(code) + 1), dict[int, tuple[int, bool]]()
    for i in reversed(range(len(code))):
        instruction, onward = code[i], best[i + 1]
        if instruction.name == "EXIT" and not instruction.predicate:
            onward = 0.0
        elif instruction.target is not None and instruction.target > instruction.address:
            target = index[instruction.target]
            always = not instruction.predicate and "UP" not in instruction.arguments.split("`")[0]
            taken = always or best[target] > onward + 1e-9
            jumps[i] = target, taken
            onward = best[target] if taken else onward
        elif instruction.target is not None and not instruction.predicate:
            onward = -1e6  # the way back from rarely used code that lies behind the end
        best[i] = worth[i] + onward
    return jumps


_WORTH = {"HGMMA": 1.0, "HMMA": 1.0, "STG": 0.3, "CALL": -0.1}


# Running it -----------------------------------------------------------------------------------------------------------


def occupancy(registers: int, warps: int, shared: int) -> int:
    """Return how many programs a multiprocessor holds at a time.

    >>> occupancy(registers=128, warps=8, shared=66000)
    2
    """
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, 233472 // (shared + 1024), 64 // warps, 32)


@dataclass
class Simulation:
    """The course of a simulation: cycles in all, those that each pipe was busy, and those lost by what was awaited."""

    cycles: float = 0.0
    issued: int = 0
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    idle: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(eq=False)
class _Warp:
    """A warp on its way through a program."""

    program: int
    path: Sequence[int]
    ready: float
    at: int = 0
    copied: float = 0.0  # when all copies to shared memory so far are done
    scoreboards: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    products: list[float] = field(default_factory=list)  # when each group of products is done
    at_barrier: bool = False


def simulate(
    code: Sequence[Instruction],
    warps: int,
    resident: int,
    paths: Iterable[Sequence[int]],
    *,
    latency: int = L2_LATENCY,
) -> Simulation:
    """Run programs through one partition of a multiprocessor, so many at a time.

    Args:
        code: instructions of the kernel.
        warps: warps of a program.
        resident: programs that a multiprocessor holds at a time.
        paths: what each program executes, in the order in which they start (:func:`unroll`).
        latency: cycles that copies to shared memory take beside those of the bandwidth.
    """
    partition = _Partition(code, max(warps // 4, 1), iter(paths), latency)
    for _ in range(resident):
        partition.start_program(0.0)
    while partition.warps:
        partition.issue()
    return partition.result


class _Partition:
    """A quarter of a multiprocessor and the warps that it holds."""

    def __init__(
        self,
        code: Sequence[Instruction],
        warps_each: int,
        paths: Iterator[Sequence[int]],
        latency: int,
    ):
        self.steps = [_Step.of(instruction) for instruction in code]
        self.warps_each, self.paths = warps_each, paths
        self.latency = latency
        self.warps: list[_Warp] = []
        self.last: _Warp | None = None
        self.left = Counter[int]()
        self.free: dict[str, float] = defaultdict(float)  # when each pipe takes the next instruction
        self.waiting: dict[int, list[_Warp]] = defaultdict(list)
        self.now = 0.0
        self.programs = 0
        self.result = Simulation()

    def start_program(self, time: float) -> None:
        path = next(self.paths, None)
        if path is None:
            return
        self.programs += 1
        self.left[self.programs] = self.warps_each
        self.warps += [_Warp(self.programs, path, time) for _ in range(self.warps_each)]

    def issue(self) -> None:
        """Issue the instruction that can go first; between equals the warp goes on that went last."""
        first, why, warp = 1e18, "", self.warps[0]
        for candidate in self.warps:
            if not candidate.at_barrier:
                time, reason = self.earliest(candidate)
                time = max(time, self.now)
                if time < first or (time == first and candidate is self.last):
                    first, why, warp = time, reason, candidate
        if first > self.now:
            self.result.idle[why] += first - self.now
        self.result.issued += 1
        self.now, self.last = first + 1, warp
        self.execute(warp, self.steps[warp.path[warp.at]], first)
        warp.at += 1
        self.result.cycles = max(self.result.cycles, first)
        if warp.at == len(warp.path):
            self.warps.remove(warp)
            self.left[warp.program] -= 1
            if not self.left[warp.program]:
                self.start_program(first + LAUNCH)

    def earliest(self, warp: _Warp) -> tuple[float, str]:
        """Find when the next instruction of a warp can issue, and what it waits for."""
        step = self.steps[warp.path[warp.at]]
        time, why = warp.ready, "stall"
        for board in step.waits:
            if warp.scoreboards[board] and (done := max(warp.scoreboards[board])) > time:
                time, why = done, "copy" if done <= warp.copied else "result"
        if step.kind == "await copies":
            board, pending = step.depends
            awaited = sorted(warp.scoreboards[board])[: len(warp.scoreboards[board]) - pending]
            if awaited and awaited[-1] > time:
                time, why = awaited[-1], "copy"
        elif step.kind == "await products":
            awaited = warp.products[: len(warp.products) - step.depends[1]]
            if awaited and awaited[-1] > time:
                time, why = awaited[-1], "product"
        if step.unit.pipe and self.free[step.unit.pipe] > time:
            time, why = self.free[step.unit.pipe], f"{step.unit.pipe} pipe"
        return time, why

    def execute(self, warp: _Warp, step: "_Step", time: float) -> None:
        """Occupy its pipe, and note when its result will be there."""
        warp.ready = time + step.stall
        if step.never:
            return
        done = time + step.unit.latency
        if step.unit.pipe:
            self.occupy(step.unit.pipe, time, step.unit.cycles)
        if step.kind == "product":
            last = self.occupy("tensor", time + 8, step.cycles) + MATRIX_LATENCY
            if step.commits:
                warp.products = [*warp.products[-7:], last]
        elif step.kind == "await products" and not step.depends[1]:
            warp.products = []
        elif step.kind == "arrive":
            warp.ready = max(warp.ready, time + ARRIVE)
        elif step.kind in ("copy", "load", "store"):
            # Four partitions ask for as much at the same time.
            done_copying = self.occupy("bandwidth", time, 4 * step.bytes / L2_BYTES)
            if step.kind == "copy":
                done = warp.copied = max(warp.copied, done_copying + self.latency)
            elif step.kind == "load":
                done = done_copying + MEMORY_LATENCY
        elif step.kind == "commit copies":
            done = max(warp.copied, time + 1)
        elif step.kind == "barrier":
            self.wait_for_others(warp, time)
        for board, when in ((step.sets, done), (step.frees, time + (FENCE if step.kind == "fence" else 12))):
            if board is not None:
                pending = warp.scoreboards[board]
                # Groups of copies are counted, all else is waited for until nothing is left.
                kept = pending[-15:] if step.kind == "commit copies" else [p for p in pending if p > time]
                warp.scoreboards[board] = [*kept, when]

    def occupy(self, pipe: str, time: float, cycles: float) -> float:
        """Take a pipe for some cycles once it is free; return when it is free again."""
        self.free[pipe] = max(self.free[pipe], time) + cycles
        self.result.busy[pipe] += cycles
        return self.free[pipe]

    def wait_for_others(self, warp: _Warp, time: float) -> None:
        """Stop a warp until the others of its program on this partition have come to the barrier."""
        together = self.waiting[warp.program]
        together.append(warp)
        warp.at_barrier = len(together) < self.warps_each
        if not warp.at_barrier:
            for other in together:
                other.at_barrier, other.ready = False, max(other.ready, time + BARRIER)
            together.clear()


_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1}
_KINDS = {
    "HGMMA": "product",
    "BAR": "barrier",
    "MEMBAR": "fence",
    "FENCE": "fence",
    "LDGDEPBAR": "commit copies",
    "LDGSTS": "copy",
    "LDG": "load",
    "STG": "store",
}


@dataclass(frozen=True)
class _Step:
    """An instruction as the simulation needs it."""

    unit: Unit
    kind: str
    stall: int
    sets: int | None
    frees: int | None
    waits: tuple[int, ...]
    never: bool
    bytes: int
    cycles: float
    commits: bool
    depends: tuple[int, int]

    @classmethod
    def of(cls, instruction: Instruction) -> "_Step":
        name, opcode, arguments = instruction.name, instruction.opcode, instruction.arguments
        unit, kind = UNITS.get(name, OTHER), _KINDS.get(name, "")
        moved = 32 * next((width for mark, width in _WIDTHS.items() if mark in opcode), 4)
        if name in ("LDSM", "STSM"):
            moved = 128 * int(count if (count := opcode.rpartition(".")[2]).isdigit() else 1)
        if unit.pipe == "memory":
            unit = unit._replace(cycles=max(unit.cycles, moved // 32))
        if kind == "copy" and instruction.predicate:
            moved = 0  # a vector that few lanes copy for all: next to nothing
        depends = (0, 0)
        if found := re.search(r"SB(\d), 0x(\w+)" if name == "DEPBAR" else r"gsb0, 0x(\w+)", arguments):
            board = int(found[1]) if name == "DEPBAR" else 0
            depends = board, int(found[len(found.groups())], 16)
        if name == "WARPGROUP":
            kind = "await products" if "DEPBAR" in opcode else "arrive"
        elif name == "DEPBAR" and found:
            kind = "await copies"
        return cls(
            unit,
            kind,
            instruction.stall,
            instruction.sets,
            instruction.frees,
            instruction.waits,
            instruction.predicate == "@!PT",
            moved,
            _product_cycles(opcode, arguments) if kind == "product" else 0.0,
            "gsb0" in arguments,
            depends,
        )


def _product_cycles(opcode: str, arguments: str) -> float:
    """Cycles of a product ``64 x n x k``: those of the multiply-adds, or of its operands' way from shared memory."""
    columns = int(opcode.split(".")[1].split("x")[1])
    left_in_shared = arguments.split(",")[1].strip().startswith("gdesc")
    return max(columns / 2, columns / 4 + (16 if left_in_shared else 0))
