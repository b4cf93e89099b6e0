"""Numbers that are meant to be reached, mostly on an H100 in bfloat16, and whether they are."""

from collections.abc import Callable
from dataclasses import dataclass

import records
from records import Record

_GUIDED, _TRAINED, _LARGE = "guided sampling", "Fashion-MNIST 2-128-4-2, trained", "ImageNet64 2-768-8-8"
_ITARFLOW = "iTarFlow, Fashion-MNIST 2-128-4-1/1/1/6, trained"
_STARFLOW = "STARFlow, latents 4 x 16 x 16, 1-128-6-1/1/1/1/1/12, random"
_SDPA = ("SDPA flash", "SDPA cuDNN", "SDPA efficient")
Value = Callable[[list[Record]], float | None]


@dataclass(frozen=True)
class Target:
    """A number to reach; ``value`` finds it in the rows of a device, in the worst of those that it is about."""

    name: str
    bound: float
    show: str
    value: Value
    at_most: bool = False

    @property
    def required(self) -> str:
        """Write the bound."""
        return f"{'≤' if self.at_most else '≥'} {self.show.format(self.bound)}"

    def verdict(self, rows: list[Record]) -> str:
        """Write the value and whether it is enough."""
        value = self.value(rows)
        if value is None:
            return "not measured"
        reached = value <= self.bound if self.at_most else value >= self.bound
        return f"{self.show.format(value)}, {'reached' if reached else 'not reached'}"


def _speedup(op: str, rivals: tuple[str, ...], model: str | None = None, **shape: int) -> Value:
    """How many times as long the best of the rivals takes."""

    def value(rows: list[Record]) -> float | None:
        ratios = []
        for row in _select(rows, op, shape, model):
            times = [taken for rival in rivals if (taken := _time(row, rival))]
            if times:
                ratios.append(min(times) / _time(row, records.ours(row)))
        return min(ratios, default=None)

    return value


def _training_speedup(op: str, rivals: tuple[str, ...]) -> Value:
    """How many times as long the best of the rivals takes for forward and backward together."""

    def value(rows: list[Record]) -> float | None:
        ratios = []
        for forward in _select(rows, op, {}):
            for backward in _select(rows, f"{op} backward", forward["shape"], forward["model"]):
                taken = [(_time(forward, name), _time(backward, name)) for name in (*rivals, records.ours(forward))]
                *theirs, ours = (sum(times) if all(times) else None for times in taken)
                if ours and any(theirs):
                    ratios.append(min(filter(None, theirs)) / ours)
        return min(ratios, default=None)

    return value


def _share(op: str, **shape: int) -> Value:
    """Percent of the limit."""

    def value(rows: list[Record]) -> float | None:
        shares = [row["contenders"][records.ours(row)]["percent_of_limit"] for row in _select(rows, op, shape)]
        return min(shares, default=None)

    return value


def _widening(rows: list[Record]) -> float | None:
    """The time of 16 new tokens over that of one."""
    one, sixteen = (
        {
            row["model"]: _time(row, records.ours(row))
            for row in _select(rows, "decode_attention", {"N": 1024, "G": new})
        }
        for new in (1, 16)
    )
    return max((sixteen[model] / one[model] for model in one.keys() & sixteen.keys()), default=None)


def _passes(rows: list[Record]) -> float | None:
    """Percent of the sequential steps that whole-sequence Jacobi decoding takes, at its usual tolerance."""
    results = [records.timed(row).get("jacobi") for row in rows if row["model"] == _TRAINED]
    return max((100 * result["passes"] / result["steps"] for result in results if result), default=None)


def _latency(rows: list[Record]) -> float | None:
    """The time of 32 guided images of the large model, in seconds."""
    return min((_time(row, "auto") for row in _select(rows, _GUIDED, {"B": 32}, _LARGE)), default=None)


def _large_against_published(rows: list[Record]) -> float | None:
    """Eight times what the published code takes for one of the eight blocks, over what ``auto`` takes for all."""
    blocks = [_time(row, "published") for row in _select(rows, _GUIDED, {"B": 32}, "ImageNet64 2-768-1-8")]
    latency = _latency(rows)
    return 8 * blocks[0] / latency if latency and blocks and blocks[0] else None


def _over_floor(rows: list[Record]) -> float | None:
    """The time of sequential decoding over that of reading weights and cache once per step."""
    timed = [row for row in _select(rows, _GUIDED, {"B": 32}, _LARGE) if _time(row, "sequential")]
    return max((_time(row, "sequential") / records.floors(row)["copy"] for row in timed), default=None)


def _faster(
    name: str, bound: float, op: str, rivals: tuple[str, ...], model: str | None = None, **shape: int
) -> Target:
    return Target(f"{name}, against {', '.join(rivals)}", bound, _TIMES, _speedup(op, rivals, model, **shape))


def _inverses(model: str, rivals: tuple[str, ...], bounds: dict[int, float]) -> list[Target]:
    """Ask that another library's flow is inverted so many times as fast as by the best of the rivals, by batch."""
    return [
        _faster(f"{model} inverse, batch {batch}", bound, "inverse", rivals, model, B=batch)
        for batch, bound in bounds.items()
    ]


_TIMES, _PERCENT = "{:.2f}x", "{:.0f} %"
_COMPILED_MIXTURE = _training_speedup("mixture_logistic", ("compiled reference",))
_PLAIN_MIXTURE = _training_speedup("mixture_logistic", ("reference",))
_JACOBI = Target("trained model, Jacobi passes, of the sequential steps", 12.5, "{:.1f} %", _passes, at_most=True)

# By the kind of device; a GPU computes in bfloat16.
TARGETS = {
    "GPU": (
        _faster("attention forward, N = 256", 1.0, "causal_attention", _SDPA, N=256),
        _faster("attention forward, N = 1024", 1.0, "causal_attention", _SDPA, N=1024),
        _faster("attention backward", 0.9, "causal_attention backward", _SDPA),
        _faster("attention backward", 1.1, "causal_attention backward", ("SDPA flash",)),
        Target("affine forward, of the copy rate", 85, _PERCENT, _share("affine_forward")),
        Target("affine inverse, of the copy rate", 85, _PERCENT, _share("affine_inverse")),
        Target("affine backward, of the copy rate", 85, _PERCENT, _share("affine_forward backward")),
        Target("decode attention, N = 1024, of the copy rate", 80, _PERCENT, _share("decode_attention", N=1024, G=1)),
        Target("decode attention, the time of 16 new tokens over one", 1.5, _TIMES, _widening, at_most=True),
        Target("mixture forward and backward, against it compiled", 3.0, _TIMES, _COMPILED_MIXTURE),
        _faster("training step", 1.5, "training step", ("eager",)),
        _faster("training step", 1.15, "training step", ("compiled eager",)),
        Target("training step, of the matrix rate", 50, _PERCENT, _share("training step")),
        _JACOBI,
        Target(f"{_LARGE}, 32 guided, against published (a block, times 8)", 20, _TIMES, _large_against_published),
        Target(f"{_LARGE}, 32 guided, auto", 2.5, "{:.2f} s", _latency, at_most=True),
        Target(f"{_LARGE}, 32 guided, sequential over its floor", 2.0, _TIMES, _over_floor, at_most=True),
    ),
    "CPU": (
        Target("mixture forward and backward, against the plain formula", 1.0, _TIMES, _PLAIN_MIXTURE),
        _JACOBI,
        _faster("trained model, 1 guided", 1.3, _GUIDED, ("sequential",), _TRAINED, B=1),
        # Not slower, give or take the noise of the clock.
        _faster("trained model, 16 guided", 0.97, _GUIDED, ("sequential",), _TRAINED, B=16),
        _faster("trained model, 1 guided", 5.0, _GUIDED, ("published",), _TRAINED, B=1),
        _faster("trained model, 16 guided", 5.0, _GUIDED, ("published",), _TRAINED, B=16),
        _faster("iTarFlow, 1 guided", 3.0, _GUIDED, ("published",), _ITARFLOW, B=1),
        _faster("iTarFlow, 16 guided", 3.0, _GUIDED, ("published",), _ITARFLOW, B=16),
        _faster("STARFlow, 1 guided", 3.0, _GUIDED, ("published",), _STARFLOW, B=1),
        _faster("STARFlow, 16 guided", 3.0, _GUIDED, ("published",), _STARFLOW, B=16),
        *_inverses("zuko MAF", ("zuko", "fixed point"), {1: 1.0}),
        *_inverses("zuko MAF", ("zuko",), {64: 6.0, 1024: 25.0, 4096: 35.0}),
        *_inverses("nflows MAF", ("nflows",), {64: 6.0, 1024: 22.0, 4096: 28.0}),
        *_inverses("zuko NSF", ("zuko",), {1024: 10.0}),
        _faster("density, batch 4096", 1.1, "density", ("zuko", "nflows"), B=4096),
    ),
}


def _select(rows: list[Record], op: str, shape: dict[str, int], model: str | None = None) -> list[Record]:
    return [
        row
        for row in rows
        if row["op"] == op
        and model in (None, row["model"])
        and shape.items() <= row["shape"].items()
        and records.ours(row)
    ]


def _time(row: Record, name: str) -> float | None:
    return row["contenders"].get(name, {}).get("p50")
