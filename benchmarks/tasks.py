"""The tasks of the processes that ``gpu.py`` starts; they tell what they find at once, and :mod:`stages` listens.

Each imports what it needs itself: most of what a small one takes is imports.
"""

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

import fallbacks
from processes import tell

# The configurations that have been told.
_told: set[str] = set()


def main(task: str, device: str, known: dict[str, int], **options: Any) -> None:
    """Do a task on a device, where kernels are known to work at these levels."""
    # Whoever is interrupted says where it stands, even if that is inside of a driver.
    faulthandler.enable()
    faulthandler.register(signal.SIGINT, chain=True)
    fallbacks.known.update(known)
    TASKS[task](torch.device(device), **options)


def run_case(device: torch.device, case: str, level: int) -> None:
    """Run a case of the smoke test with configurations of some level."""
    import device as devices
    import smoke

    fallbacks.watch(_tell_once)
    with fallbacks.at(level):
        try:
            smoke.run(case, device)
        except Exception as failure:
            devices.require_alive(failure)
            raise


def measure_rows(device: torch.device, pasts: dict[str, dict[str, Any]], compiled: bool) -> None:
    """Measure rows, each with what happened to it before."""
    import records
    import rows

    fallbacks.watch(_tell_once)
    by_name = {row.name: row for row in rows.all_rows(device)}
    for name, past in pasts.items():
        tell(row=name)
        _told.clear()
        options = {"past": records.Past(**past), "begun": lambda contender: tell(contender=contender)}
        record = records.attempt(by_name[name], device, compiled, **options).record
        for entry in record.get("contenders", {}).values():
            fallbacks.learn(entry.get("configs", ()), entry.get("level", 0))
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        tell(record=record)


def _tell_once(name: str, config: fallbacks.Config) -> None:
    """Tell what is about to be launched for the first time: later launches may be timed."""
    if name not in _told:
        _told.add(name)
        tell(launching=name, config=config)


def compile_ahead(device: torch.device, part: int, parts: int) -> None:
    """Compile one part of what will be measured, as politely as can be; Triton's cache keeps it for all processes."""
    import warm

    os.nice(10)
    for launch in warm.launches()[part::parts]:
        warm.compile(launch, device)


def tune(device: torch.device, problems: list[str], budget: float, workers: int) -> None:
    """Tune problems in the order given."""
    from tarflow_kernels import tune

    fallbacks.watch()
    named = [argument for problem in problems for argument in ("--problem", problem)]
    tune.main([*named, "--seconds", str(budget), "--workers", str(workers)])


def profile(device: torch.device, names: list[str]) -> None:
    """Find where whole steps spend their time."""
    import profiles

    fallbacks.watch()
    for name in names:
        tell(profile=name, table=profiles.PROFILES[name](device))


TASKS: dict[str, Callable[..., None]] = {
    "smoke": run_case,
    "rows": measure_rows,
    "warm": compile_ahead,
    "tune": tune,
    "profile": profile,
}


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
