"""Runs that are killed and resumed, that share a folder, that may not write, or whose disk is full."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from cases import TINY, TINY_FLOWPP, Ended, Process, equal_trees, must_run, newest_state, results, run, same
from PIL import Image

FREQUENT = ("--max-steps=14", "--checkpoint-every=3", "--evaluate-every=5", "--sample-every=7", "--keep-checkpoints=2")
FOLDER_DATA = ("--dataset=folder", "--data-dir=../pictures", "--image-size=14")
KINDS = {"tarflow": (*TINY, *FREQUENT), "flowpp": (*TINY_FLOWPP, *FREQUENT), "folder": (*TINY, *FREQUENT, *FOLDER_DATA)}
KILLS_PER_RUN = 5
RESULTS = ("model.safetensors", "metrics.jsonl")


def make_pictures(folder: Path) -> None:
    """Two classes of small pictures in ``pictures``."""
    draw = np.random.default_rng(0)
    for number in range(40):
        path = folder / f"pictures/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(path)


def difference(whole: Path, other: Path) -> list[str]:
    """In what a run differs from one that nobody disturbed, where all is to be equal but clocks and events."""
    if not (other / "model.safetensors").exists():
        return ["no weights"]
    found = [name for name in RESULTS if not same(results(whole, [name]), results(other, [name]))]
    if not equal_trees(newest_state(whole), newest_state(other)):
        found.append("checkpoint")
    names = [{str(p.relative_to(run)) for p in run.rglob("*") if "tfevents" not in p.name} for run in (whole, other)]
    return found + [f"left over: {name}" for name in names[1] - names[0]] + [f"no {n}" for n in names[0] - names[1]]


def resume_or_start(folder: Path, settings: tuple[str, ...]) -> tuple[str, ...]:
    """The command that a user types after a crash."""
    return (
        ("train", f"--resume={folder.name}")
        if (folder / "config.json").exists()
        else ("train", f"--out={folder.name}", *settings)
    )


class Whole:
    """Undisturbed runs of each kind, made when first asked for."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, {}
        make_pictures(folder)
        (folder / "runs").mkdir()

    def __getitem__(self, kind: str) -> tuple[Path, Ended]:
        if kind not in self.made:
            out = self.folder / "runs" / f"whole-{kind}"
            self.made[kind] = out, must_run(("train", f"--out={out.name}", *KINDS[kind]), out.parent)
        return self.made[kind]


def strike_at_file(folder: Path, number: int) -> None:
    """In the process to be killed: it dies when it opens, renames or removes something in the folder the n-th time."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(folder.name):
            count += 1
            if count == number:
                os.kill(os.getpid(), 9)

    sys.addaudithook(hook)


class Kills:
    """The campaign: number n is a kill; every fifth, the run goes on to its end and is compared."""

    def __init__(self, folder: Path):
        self.whole = Whole(folder)

    def case(self, rng: random.Random, number: int) -> dict:
        """A kill and, when its turn has come, the end of the run, as a row of the report."""
        kind = list(KINDS)[number // KILLS_PER_RUN % len(KINDS)]
        folder = self.whole.folder / "runs" / f"killed-{number // KILLS_PER_RUN}"
        whole, usual = self.whole[kind]
        argv, aim = (
            resume_or_start(folder, KINDS[kind]),
            ("file event", "file event", "temporary file", "moment", "start")[number % 5],
        )
        if aim == "file event":
            at = rng.randrange(1, 25)
            process = Process(argv, folder.parent, lambda: strike_at_file(folder, at))
            ended, aim = process.wait(), f"file event {at}"
        else:
            process = Process(argv, folder.parent)
            ended = self._strike(process, folder, aim, rng, usual)
        row = {"case": f"{kind}, {aim}", "argv": argv, "ended": ended, "folder": folder, "verdict": "same"}
        if ended.status not in (0, -9):
            row["verdict"] = "lost"
        elif (number + 1) % KILLS_PER_RUN == 0:
            ended = row["ended"] = run(resume_or_start(folder, KINDS[kind]), folder.parent)
            wrong = difference(whole, folder) if ended.status == 0 else ["does not go on"]
            row["case"] += f"; then to the end{', different: ' if wrong else ''}{', '.join(sorted(wrong))}"
            row["verdict"] = "lost" if wrong else "same"
        row["killed"] = ended.status == -9
        return row

    def _strike(self, process: Process, folder: Path, aim: str, rng: random.Random, usual: Ended) -> Ended:
        wait = {"moment": rng.uniform(0, usual.seconds), "start": rng.uniform(0, 0.4)}.get(aim)
        until = time.monotonic() + (60 if wait is None else wait)
        skip = rng.randrange(4)
        seen: set[str] = set()
        while process.poll() is None and time.monotonic() < until:
            if wait is not None:
                time.sleep(0.01)
                continue
            beside = {
                str(path) for path in (*folder.glob(".*"), *folder.glob("checkpoints/.*")) if "lock" not in path.name
            }
            seen |= beside
            if beside and len(seen) > skip:
                break
        return process.kill()


class Folders:
    """The campaign: two runs in a folder, folders that may not be written to, and disks that fill up."""

    def __init__(self, folder: Path):
        self.whole = Whole(folder)
        self.scenarios = (self.two_starts, self.resumed_twice, self.no_name, self.read_only, *[self.full_disk] * 4)

    def case(self, rng: random.Random, number: int) -> dict:
        """One scenario, as a row of the report."""
        scenario = self.scenarios[number % len(self.scenarios)]
        folder = self.whole.folder / "runs" / f"{scenario.__name__}-{number}"
        what, verdict, ended = scenario(rng, folder)
        return {
            "case": f"{scenario.__name__}: {what}",
            "argv": (),
            "verdict": verdict,
            "ended": ended,
            "folder": folder,
        }

    def two_starts(self, rng: random.Random, folder: Path):
        """Two new runs into one folder: one of them wins, the other says so at once or when it finds out."""
        argv = ("train", f"--out={folder.name}", *KINDS["tarflow"])
        first = Process(argv, folder.parent)
        time.sleep(rng.uniform(0, 1))
        return self._one_survives(folder, first, Process(argv, folder.parent))

    def resumed_twice(self, rng: random.Random, folder: Path):
        """A run that still trains is resumed."""
        first = Process(("train", f"--out={folder.name}", *KINDS["tarflow"], "--device=cpu"), folder.parent)
        while not list(folder.glob("checkpoints/step*")) and first.poll() is None:
            time.sleep(0.005)
        return self._one_survives(folder, first, Process(("train", f"--resume={folder.name}"), folder.parent))

    def _one_survives(self, folder: Path, first: Process, second: Process):
        ends = [first.wait(), second.wait()]
        whole, usual = self.whole["tarflow"]
        verdicts = sorted(ended.verdict(usual.peak) for ended in ends)
        loser = max(ends, key=lambda ended: ended.status)
        wrong = difference(whole, folder)
        if verdicts != ["accepted", "refused"] or wrong:
            return f"{' and '.join(verdicts)}; different: {', '.join(sorted(wrong))}", "lost", loser
        return "one wins, the other says so", "refused", loser

    def no_name(self, rng: random.Random, folder: Path):
        """Two runs at once without --out: each gets a folder of its own."""
        folder.mkdir()
        processes = [Process(("train", *KINDS["tarflow"]), folder) for _ in range(2)]
        ends = [process.wait() for process in processes]
        whole, _ = self.whole["tarflow"]
        wrong = [name for run in (folder / "runs").glob("*") for name in difference(whole, run)]
        fine = not any(ended.status for ended in ends) and not wrong and len(list((folder / "runs").glob("*"))) == 2
        return (
            "each has its own" if fine else f"different: {wrong}",
            "same" if fine else "lost",
            max(ends, key=lambda e: e.status),
        )

    def read_only(self, rng: random.Random, folder: Path):
        """A run of somebody else: reading it works, and what would write says so in a line."""
        whole, usual = self.whole["tarflow"]
        shutil.copytree(whole, folder)
        mine = folder.parent / f"{folder.name}-mine"
        mine.mkdir()
        for path in (*folder.parents[:-2], *folder.rglob("*"), folder):
            path.chmod(0o755 if path.is_dir() else 0o644)
        mine.chmod(0o777)
        name = f"../{folder.name}"
        for argv in (
            ("sample", name, "--out=drawn.png", "--num=2"), ("evaluate", name, "--num-images=4"),
            ("calibrate", name, "--batches", "1"), ("train", f"--resume={name}", "--max-steps=16"),
            ("train", f"--out={name}/new", *TINY), ("sample", name, f"--out={name}/x.png", "--num=2"),
        ):  # fmt: skip
            ended, verdict = run(argv, mine, prepare=_nobody), "accepted" if "--out=drawn.png" in argv else "refused"
            if ended.verdict(usual.peak) != verdict:
                return f"{' '.join(argv[:3])}: {ended.verdict(usual.peak)}, not {verdict}", "lost", ended
        wrong = difference(whole, folder)
        return f"reads, and refuses the rest {wrong or ''}", "lost" if wrong else "refused", ended

    def full_disk(self, rng: random.Random, folder: Path):
        """Training on a disk that fills up ends in a line; with room made, it goes on as if nothing had been."""
        whole, usual = self.whole["tarflow"]
        need = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        disk, room = folder.parent / f"{folder.name}-disk", rng.randrange(16_384, int(1.2 * need))
        disk.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], capture_output=True
        ).returncode:
            return "skipped: a small disk cannot be mounted here", "skipped", usual
        try:
            ended = run(("train", "--out=run", *KINDS["tarflow"]), disk.parent if not disk.exists() else disk)
            verdict = ended.verdict(usual.peak)
            if verdict not in ("accepted", "refused"):
                return f"{room} bytes", verdict, ended
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            again = run(resume_or_start(disk / "run", KINDS["tarflow"]), disk) if verdict == "refused" else ended
            wrong = difference(whole, disk / "run") if again.status == 0 else ["does not go on"]
            right = "refused" if verdict == "refused" else "same"
            return f"{room} bytes {', '.join(sorted(wrong))}", "lost" if wrong else right, again
        finally:
            subprocess.run(["umount", disk], check=True)


def _nobody() -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
