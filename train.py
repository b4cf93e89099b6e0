"""``python train.py``: the train command of tarflow; the other commands work here too."""

import sys

from tarflow.cli import COMMANDS, main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(main(arguments if arguments and arguments[0] in COMMANDS else ["train", *arguments]))
