"""What the kernels are meant to reach on an H100, in bfloat16, and whether they do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import records
from records import Record

_SDPA = ("SDPA flash", "SDPA cuDNN", "SDPA efficient")
Value = Callable[[Iterable[Record]], float | None]


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
        """The bound as text."""
        return f"{'≤' if self.at_most else '≥'} {self.show.format(self.bound)}"

    def verdict(self, rows: Iterable[Record]) -> str | None:
        """The value and whether it is enough; None where it was not measured."""
        value = self.value(rows)
        if value is None:
            return None
        reached = value <= self.bound if self.at_most else value >= self.bound
        return f"{self.show.format(value)}, {'reached' if reached else 'not reached'}"


def _speedup(op: str, rivals: tuple[str, ...], **shape: int) -> Value:
    """How many times as long the best of the rivals takes."""

    def value(rows: Iterable[Record]) -> float | None:
        ratios = []
        for row in _select(rows, op, shape):
            times = [taken for rival in rivals if (taken := _time(row, rival))]
            if times:
                ratios.append(min(times) / _time(row, records.ours(row)))
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
    Target("training step, against the dense mask", 1.5, _TIMES, _speedup("training step", ("eager",))),
    Target("training step, against it compiled", 1.15, _TIMES, _speedup("training step", ("compiled eager",))),
    Target("training step, of the matrix rate", 50, _PERCENT, _share("training step")),
)


def _select(rows: Iterable[Record], op: str, shape: dict[str, int]) -> list[Record]:
    return [row for row in rows if row["op"] == op and shape.items() <= row["shape"].items() and records.ours(row)]


def _time(row: Record, name: str) -> float | None:
    return row["contenders"].get(name, {}).get("p50")
