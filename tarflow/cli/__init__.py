"""The commands, each in a file of its name that is imported when it runs, and the table of them."""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..hardware import keep_freed_memory
from ..training.interruptions import TrainingDiverged, is_out_of_memory
from .parsing import UsageError

__all__ = ["COMMANDS", "Command", "main"]


@dataclass(frozen=True)
class Command:
    """A command: its name, the arguments that it needs, a sentence, and how it takes less memory.

    The module of its name has a function ``run`` that takes its arguments.
    """

    name: str
    needs: str
    summary: str
    takes_less: str

    def run(self, arguments: Sequence[str]) -> None:
        """Run it."""
        importlib.import_module(f"{__name__}.{self.name}").run(arguments)


COMMANDS = {
    command.name: command
    for command in (
        Command("train", "", "train a model; without flags, on Fashion-MNIST", "a smaller --batch-size or model"),
        Command("sample", "RUN", "draw samples from a trained model", "a smaller --num"),
        Command("calibrate", "RUN", "time the decoders, for the fastest samples", "smaller --batches"),
        Command("evaluate", "RUN", "score a trained model, and its samples", "a smaller --batch-size"),
        Command("statistics", "DATASET", "compute what samples are compared with", "a smaller --batch-size"),
        Command("encode", "DATASET OUT", "compute the latents of a dataset", "a smaller --batch-size"),
        Command("demo", "[RUN]", "serve a page to play with a model", "a smaller model"),
        Command("convert", "CKPT OUT", "convert a published checkpoint", "a machine with more of it"),
        Command("push", "RUN OWNER/NAME", "publish a model on the Hugging Face hub", "a machine with more of it"),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; a mistake of the user ends in one line on stderr.

    The status is 0, or 2 for arguments that are no flags or values of the command, 130 after Ctrl-C, and 1 otherwise.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {command.name + ' ' + command.needs:22} {command.summary}" for command in COMMANDS.values())
        print("usage: tarflow COMMAND ...\n", *lines, "\ntarflow COMMAND --help lists its flags.", sep="\n")
        return 0
    if name not in COMMANDS:
        print(f"tarflow: error: command: expected one of {', '.join(COMMANDS)}; got {name!r}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    keep_freed_memory()
    try:
        command.run(arguments)
    except (ValueError, OSError, ImportError, TrainingDiverged) as error:
        # Of several processes, which torchrun numbers, all raise the same; but memory may be short in one alone.
        if os.environ.get("RANK", "0") == "0" or (error.__cause__ and is_out_of_memory(error.__cause__)):
            _print_error(name, str(error))
        return 2 if isinstance(error, UsageError) else 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _print_error(name, f"not enough memory; try {command.takes_less} ({error})")
        return 1
    except KeyboardInterrupt as stop:
        print(f"tarflow {name}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _print_error(command: str, message: str) -> None:
    print(f"tarflow {command}: error: {' '.join(message.splitlines()[:1])}", file=sys.stderr)
