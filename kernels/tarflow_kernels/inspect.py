"""The former name of :mod:`tarflow_kernels.resources`, kept for one release."""

from . import resources as _resources
from .resources import *  # noqa: F403

cases, inspect, inspect_all = _resources.every_case, _resources.measure, _resources.measure_all

if __name__ == "__main__":
    _resources.main()
