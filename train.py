"""``python train.py``: the train command of tarflow; the other commands work here too."""

import sys


def run() -> int:
    """Run the command and return its exit status."""
    try:
        from tarflow.cli import COMMANDS, main  # which takes seconds
    except KeyboardInterrupt:
        print("tarflow: interrupted", file=sys.stderr)
        return 130
    arguments = sys.argv[1:]
    return main(arguments if arguments and arguments[0] in COMMANDS else ["train", *arguments])


if __name__ == "__main__":
    sys.exit(run())
