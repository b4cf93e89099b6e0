"""Numbers that are meant to be reached, mostly on an H100 in bfloat16, and whether they are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import records
from records import Record

_GUIDED, _TRAINED, _LARGE = "guided sampling", "Fashion-MNIST 2-128-4-2, trained", "ImageNet64 2-768-8-8"
_SDPA = ("SDPA flash", "SDPA cuDNN", "SDPA efficient")
Value = Callable[[Iterable[Record]], float | None]


@dataclass(frozen=True)
class Target:
    """A number to reach; ``value`` finds it in the rows of a device, in the worst of those that it is about.

    ``devices``: which kinds it is meant for.
    """

    name: str
    bound: float
    show: str
    value: Value
    at_most: bool = False
    devices: tuple[str, ...] = ("GPU",)

    @property
    def required(self) -> str:
        """Write the bound."""
        return f"{'≤' if self.at_most else '≥'} {self.show.format(self.bound)}"

    def verdict(self, rows: Iterable[Record]) -> str | None:
        """Write the value and whether it is enough; None where it was not measured."""
        value = self.value(rows)
        if value is None:
            return None
        reached = value <= self.bound if self.at_most else value >= self.bound
        return f"{self.show.format(value)}, {'reached' if reached else 'not reached'}"


def _speedup(op: str, rivals: tuple[str, ...], model: str | None = None, **shape: int) -> Value:
    """How many times as long the best of the rivals takes."""

    def value(rows: Iterable[Record]) -> float | None:
        ratios = []
        for row in _select(rows, op, shape, model):
            times = [taken for rival in rivals if (taken := _time(row, rival))]
            if times:
                ratios.append(min(times) / _time(row, records.ours(row)))
        return min(ratios, default=None)

    return value


def _training_speedup(op: str, rivals: tuple[str, ...]) -> Value:
    """How many times as long the best of the rivals takes for forward and backward together."""

    def value(rows: Iterable[Record]) -> float | None:
        rows, ratios = list(rows), []
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

    def value(rows: Iterable[Record]) -> float | None:
        shares = [row["contenders"][records.ours(row)]["percent_of_limit"] for row in _select(rows, op, shape)]
        return min(shares, default=None)

    return value


def _widening(rows: Iterable[Record]) -> float | None:
    """The time of 16 new tokens over that of one."""
    rows = list(rows)
    one, sixteen = (
        {
            row["model"]: _time(row, records.ours(row))
            for row in _select(rows, "decode_attention", {"N": 1024, "G": new})
        }
        for new in (1, 16)
    )
    return max((sixteen[model] / one[model] for model in one.keys() & sixteen.keys()), default=None)


def _passes(rows: Iterable[Record]) -> float | None:
    """Percent of the sequential steps that whole-sequence Jacobi decoding takes, at its usual tolerance."""
    trained = [row for row in rows if row["model"] == _TRAINED]
    results = [row.get("contenders", {}).get("jacobi", {}) for row in trained]
    counted = [result for result in results if "passes" in result]
    return max((100 * result["passes"] / result["steps"] for result in counted), default=None)


def _latency(rows: Iterable[Record]) -> float | None:
    """The time of 32 guided images of the large model, in seconds."""
    return min((_time(row, "auto") for row in _select(rows, _GUIDED, {"B": 32}, _LARGE)), default=None)


def _large_against_published(rows: Iterable[Record]) -> float | None:
    """Eight times what the published code takes for one of the eight blocks, over what ``auto`` takes for all."""
    rows = list(rows)
    blocks = [_time(row, "published") for row in _select(rows, _GUIDED, {"B": 32}, "ImageNet64 2-768-1-8")]
    latency = _latency(rows)
    return 8 * blocks[0] / latency if latency and blocks and blocks[0] else None


def _over_floor(rows: Iterable[Record]) -> float | None:
    """The time of sequential decoding over that of reading weights and cache once per step."""
    rows = _select(rows, _GUIDED, {"B": 32}, _LARGE)
    return max(
        (taken / records.floors(row)["copy"] for row in rows if (taken := _time(row, "sequential"))), default=None
    )


def _flow_targets(model: str, rivals: tuple[str, ...], bounds: dict[int, float]) -> list[Target]:
    """Ask that another library's flow is inverted so many times as fast as by the best of the rivals, by batch."""
    return [
        Target(
            f"CPU, {model} inverse, batch {batch}, against {' and '.join(rivals)}",
            bound,
            _TIMES,
            _speedup("inverse", rivals, model, B=batch),
            devices=("CPU",),
        )
        for batch, bound in bounds.items()
    ]


_MIXTURE, _COMPILED = "mixture_logistic", ("compiled reference",)
_FORWARD, _BACKWARD, _TIMES, _PERCENT = "causal_attention", "causal_attention backward", "{:.2f}x", "{:.0f} %"

TARGETS = (
    Target("attention forward, N = 256, against the best SDPA", 1.0, _TIMES, _speedup(_FORWARD, _SDPA, N=256)),
    Target("attention forward, N = 1024, against the best SDPA", 1.0, _TIMES, _speedup(_FORWARD, _SDPA, N=1024)),
    Target("attention backward, against the best SDPA", 0.9, _TIMES, _speedup(_BACKWARD, _SDPA)),
    Target("attention backward, against FlashAttention-2", 1.1, _TIMES, _speedup(_BACKWARD, ("SDPA flash",))),
    Target("affine forward, of the copy rate", 85, _PERCENT, _share("affine_forward")),
    Target("affine inverse, of the copy rate", 85, _PERCENT, _share("affine_inverse")),
    Target("affine backward, of the copy rate", 85, _PERCENT, _share("affine_forward backward")),
    Target("decode attention, 1024 cached, of the copy rate", 80, _PERCENT, _share("decode_attention", N=1024, G=1)),
    Target("decode attention, the time of 16 new tokens over one", 1.5, _TIMES, _widening, at_most=True),
    Target("mixture forward and backward, against it compiled", 3.0, _TIMES, _training_speedup(_MIXTURE, _COMPILED)),
    Target(
        "CPU, mixture forward and backward, against the plain formula",
        1.0,
        _TIMES,
        _training_speedup(_MIXTURE, ("reference",)),
        devices=("CPU",),
    ),
    Target("training step, against the dense mask", 1.5, _TIMES, _speedup("training step", ("eager",))),
    Target("training step, against it compiled", 1.15, _TIMES, _speedup("training step", ("compiled eager",))),
    Target("training step, of the matrix rate", 50, _PERCENT, _share("training step")),
    Target("trained model, Jacobi passes, of the sequential steps", 12.5, "{:.1f} %", _passes, True, ("CPU", "GPU")),
    *(
        Target(
            f"CPU, trained model, {batch} guided, auto against {base}",
            bound,
            _TIMES,
            _speedup(_GUIDED, (base,), _TRAINED, B=batch),
            devices=("CPU",),
        )
        for base, batch, bound in (
            ("sequential", 1, 1.3),
            ("sequential", 16, 0.97),  # not slower, give or take the noise of the clock
            ("published", 1, 5.0),
            ("published", 16, 5.0),
        )
    ),
    Target(f"{_LARGE}, 32 guided, auto against published (one block, times 8)", 20, _TIMES, _large_against_published),
    Target(f"{_LARGE}, 32 guided, auto", 2.5, "{:.2f} s", _latency, at_most=True),
    Target(f"{_LARGE}, 32 guided, sequential over its floor", 2.0, _TIMES, _over_floor, at_most=True),
    *_flow_targets("zuko MAF", ("zuko", "fixed point"), {1: 1.0}),
    *_flow_targets("zuko MAF", ("zuko",), {64: 6.0, 1024: 25.0, 4096: 35.0}),
    *_flow_targets("nflows MAF", ("nflows",), {64: 6.0, 1024: 22.0, 4096: 28.0}),
    *_flow_targets("zuko NSF", ("zuko",), {1024: 10.0}),
    Target(
        "CPU, zuko and nflows density, batch 4096, against the library",
        1.1,
        _TIMES,
        _speedup("density", ("zuko", "nflows"), B=4096),
        devices=("CPU",),
    ),
)


def _select(rows: Iterable[Record], op: str, shape: dict[str, int], model: str | None = None) -> list[Record]:
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
