"""Hostile use of the commands: ``python tools/hostile files|invocations|kills|folders|all``; see docs/robustness.md.

Each case follows from the seed and its number alone, and runs in a process of its own, forked from this one.
"""

import os
import pathlib
import sys

os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "TQDM_MININTERVAL": "30"}

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tests" / "support"))

import argparse
import collections
import contextlib
import json
import random
import shutil
import tempfile
import time

import cases
import torch.utils.tensorboard
from cases import FINDINGS
from files import Files
from invocations import Invocations
from runs import Folders, Kills

CAMPAIGNS = {"files": (Files, 300), "invocations": (Invocations, 300), "kills": (Kills, 40), "folders": (Folders, 16)}


def main() -> int:
    """Run campaigns, print their findings and figures; status 1 where there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("campaign", choices=[*CAMPAIGNS, "all"])
    parser.add_argument("--count", type=int, help="cases; by default 300 files, 300 invocations, 40 kills, 16 folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=cases.SECONDS, help="limit of a case; more on a busy machine")
    parser.add_argument("--only", type=int, help="this case alone (kills: its run so far), and keep its files")
    parser.add_argument("--report", type=pathlib.Path, help="a .json with all cases")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases.SECONDS = arguments.seconds
    report = {"seed": arguments.seed, "figures": {}, "cases": []}
    for name in CAMPAIGNS if arguments.campaign == "all" else [arguments.campaign]:
        rows: list[dict] = []
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: the figures so far
            campaign(name, arguments, rows)
        report["figures"][name] = {"cases": len(rows), **collections.Counter(row["verdict"] for row in rows)}
        if name == "kills":
            report["figures"][name]["killed"] = sum(row["killed"] for row in rows)
        report["cases"] += rows
        print(f"{name}: {report['figures'][name]}", flush=True)
        if arguments.report:
            arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["verdict"] in FINDINGS for row in report["cases"]))


def campaign(name: str, arguments: argparse.Namespace, rows: list[dict]) -> None:
    """All cases of one campaign are appended to ``rows``, and findings printed as they come."""
    kind, count = CAMPAIGNS[name]
    numbers = range(arguments.count or count)
    if arguments.only is not None:
        numbers = range(arguments.only - arguments.only % 5 if name == "kills" else arguments.only, arguments.only + 1)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"hostile-{name}-"))
    os.environ["MPLCONFIGDIR"] = str(folder)
    try:
        made, began = kind(folder), time.monotonic()
        for number in numbers:
            row = made.case(random.Random(f"{arguments.seed}/{name}/{number}"), number)
            rows.append(told(name, number, row))
            if name not in ("kills", "folders") and arguments.only is None:
                shutil.rmtree(row["folder"], ignore_errors=True)
            if row["verdict"] in FINDINGS:
                lines = f"{name} {number}: {row['verdict']}: {row['case']}", *rows[-1]["stderr"][-2:]
                print(*lines, sep="\n    ", flush=True)
        print(f"{name}: {len(rows)} cases in {time.monotonic() - began:.0f} s", flush=True)
    finally:
        if arguments.only is None:
            shutil.rmtree(folder)
        else:
            print(f"kept {folder}")


def told(name: str, number: int, row: dict) -> dict:
    """A row of the report, as JSON has it."""
    ended = row.pop("ended")
    measured = {"status": ended.status, "seconds": round(ended.seconds, 2), "peak_mb": ended.peak >> 20}
    lines = [line[:300] for line in ended.lines[-6:]]
    kept = {key: value for key, value in row.items() if key != "folder"}
    return {"campaign": name, "number": number, **kept, **measured, "stderr": lines}


if __name__ == "__main__":
    sys.exit(main())
