"""The former name of :mod:`tarflow_kernels.resources`, kept for one release."""

from .resources import *  # noqa: F403
from .resources import main

if __name__ == "__main__":
    main()
