"""Wrong and odd invocations: those that cannot mean anything and have to be refused, and values drawn for any flag."""

import random
import re
import shutil
from pathlib import Path

import torch
from cases import TINY, TINY_FLOWPP, must_run, run

from published_state import published_state

TRAIN = ("train", "--out=out", *TINY, "--max-steps=2")
TRAIN_FLOWPP = ("train", "--out=out", *TINY_FLOWPP, "--max-steps=2")
SAMPLE = ("sample", "run", "--out=drawn.png", "--num=2", "--device=cpu")
EVALUATE = ("evaluate", "run", "--num-images=4", "--importance-samples=1", "--device=cpu")
CALIBRATE = ("calibrate", "run", "--batches=1", "--device=cpu")
STATISTICS = ("statistics", "fashion-mnist", "--split=test", "--out=statistics", "--device=cpu")
CONVERT = ("convert", "published.pth", "out")
COMMANDS = (TRAIN, TRAIN, TRAIN_FLOWPP, SAMPLE, SAMPLE, EVALUATE, STATISTICS, CALIBRATE, CONVERT)

# Each word by itself cannot mean anything; "|" stands between flags that belong together.
MEANINGLESS = {
    TRAIN: """
        --learning-rate=inf --learning-rate=nan --min-learning-rate=nan --min-learning-rate=inf --gradient-clip=inf
        --gradient-clip=nan --weight-decay=inf --weight-decay=nan --sigma=nan --sigma=inf --sigma=-1 --sigma=1e300
        --seed=-1 --seed=99999999999999999999 --device=cpu:7 --device=meta --device=abacus --filters=-1
        --num-mixtures=65 --stack=stripe0 --image-size=0 --dataset= --out= --channels=65536|--num-blocks=64
        --channels=1000000000000000000 --num-blocks=1000000000000000000 --layers-per-block=1000000000000000000
        --num-blocks=1000000000000000000000000000000 --batch-size=1000000000000000000 --batch-size=0 --patch-size=0
        --patch-size=5 --beta2=1 --ema-decay=1 --label-drop=nan --guidance=nan --guidance=1e300 --max-steps=nan
        --sigma=0 --resize=box --preset=foo --nonsense|--help""",
    TRAIN_FLOWPP: """
        --dropout=-1 --dropout=1.5 --dropout=nan --dropout=inf --filters=-1 --filters=1000000000000000000
        --num-mixtures=0 --num-mixtures=65 --stack=squeeze --stack=stripe0 --stack= --blocks-per-coupling=-1
        --patch-size=3 --num-blocks=7 --guidance=2 --sigma=0.1 --conditional --noise=gaussian --preset=imagenet64""",
    SAMPLE: """
        --sigma=nan --sigma=-1 --sigma=inf --sigma=1e300 --seed=-1 --seed=99999999999999999999 --guidance=1e300
        --guidance=nan --guidance=inf --labels=-2 --labels=10 --labels --trajectory=drawn.png --trajectory=t.txt
        --tolerance=0.1|--decoder=sequential --tolerance=nan --tolerance=1e300 --num=0 --num=-1 --num=1000000000 --out=
        --out=nowhere/x.png --out=x.bmp --device=meta --device=cpu:7 --window=0|--decoder=jacobi --window=-5
        --temperature=nan|--guidance=1 --temperature=0|--guidance=1 --temperature=2 --decoder=foo
        --precision=float16 --nonsense|--help""",
    EVALUATE: """
        --num-images=0 --draws=0 --importance-samples=0 --batch-size=-1 --image-size=0 --dataset= --dataset=foo
        --resize=box --data-dir=nowhere --seed=-1 --seed=99999999999999999999 --device=meta --device=cpu:7
        --samples=1 --samples=-1 --samples=1000000000000000000 --guidance=2 --samples=8|--guidance=nan
        --samples=8|--statistics=nowhere --samples=8|--weights=nowhere --samples=8|--sigma=nan --nonsense|--help""",
    STATISTICS: """
        --batch-size=0 --resize=box --data-dir=nowhere --image-size=0 --seed=-1 --device=meta --out=nowhere/x
        --weights=nowhere --split=valid""",
    CALIBRATE: """
        --guidance=nan --guidance=1e300 --guidance=inf --temperature=nan --tolerance=nan --tolerance=inf --tolerance=-1
        --tolerance=3 --batches=0 --batches=-1 --batches --batches=1000000000000000000 --device=meta --device=cpu:7""",
    CONVERT: """
        --sigma=nan --sigma=inf --sigma=-1 --sigma=1e300 --in-channels=0 --in-channels=-3 --in-channels=5
        --in-channels=1000000000000000000""",
    ("train",): "--preset=cifar10-flowpp|--resume=run --resume=run|--max-steps=3 --resume=nowhere --resume=run|--out=x",
    ("sample",): "--num=1 nowhere ../run run|extra",
    ("evaluate",): "--draws=1 nowhere",
    ("convert",): "published.pth run/config.json|out nowhere.pth|out published.pth|run",
    ("bogus",): "--nonsense",
}
REFUSED = [(command, words.split("|")) for command, table in MEANINGLESS.items() for words in table.split()]
ODD_WORDS = """
    nan inf -inf -1 0 -0.0 1 2 3.5 1e300 1e-300 1000000000000000000 None True 0x10 １ 1_0 é 😀 ../.. 1,2 [1] - --
    /dev/null /dev/full x $x^ %s cpu cuda float16 folder hub: hub:no/such mixture flowpp"""
VALUES = (*ODD_WORDS.split(), "", " ", "a\nb", "7" * 31, "x" * 5000)
# A huge number of these is a wish that takes for ever, and no mistake.
ENDLESS = ("--max-steps", "--importance-samples", "--batches", "--num", "--samples", "--warmup-steps")


class Invocations:
    """The campaign: first all that must be refused, in turn; then one to three odd values each."""

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, folder / "whole"
        self.whole.mkdir()
        must_run(("train", "--out=run", *TINY), self.whole)
        torch.save(published_state(), self.whole / "published.pth")
        self.usual = max(must_run((*command,), self._copy("usual")).peak for command in set(COMMANDS))
        self.flags = {}
        for command in set(COMMANDS):
            model = [flag for flag in command if flag.startswith("--model")]
            text = must_run((command[0], *model, "--help"), folder).stdout
            names = set(re.findall(r"--[a-z][a-z0-9.-]*[a-z0-9]", text)) - {"--help", "--compile", "--no-compile"}
            self.flags[command] = sorted(names)

    def case(self, rng: random.Random, number: int) -> dict:
        """One case, as a row of the report."""
        must_refuse = number < len(REFUSED)
        if must_refuse:
            command, more = REFUSED[number]
        else:
            command = rng.choice(COMMANDS)
            more = [self._odd_flag(rng, command) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        argv = (*command, *more)
        copy = self._copy(f"invocation-{number}")
        ended = run(argv, copy)
        verdict = ended.verdict(self.usual)
        if verdict == "accepted":
            verdict = "wrong" if must_refuse else "changed"
        if verdict == "changed" and "nan" in ended.stdout:
            verdict = "wrong"
        what = " ".join((command[0], *(["--model=flowpp"] if command is TRAIN_FLOWPP else []), *more))[:200]
        return {"case": what, "argv": argv, "verdict": verdict, "ended": ended, "folder": copy}

    def _odd_flag(self, rng: random.Random, command: tuple[str, ...]) -> str:
        flag, value = rng.choice(self.flags[command]), rng.choice(VALUES)
        if flag in ENDLESS and value.isdigit():
            value = "2"
        return flag if rng.random() < 0.05 else f"{flag}={value}"

    def _copy(self, name: str) -> Path:
        copy = self.folder / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.whole, copy)
        return copy
