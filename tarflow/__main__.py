"""``python -m tarflow``, which is the command ``tarflow``: so that torchrun can start it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
