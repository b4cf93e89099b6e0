"""The former name of :mod:`tarflow_kernels.resources`, kept for one release."""

from .resources import TARGETS, Case, Resources, compile_only, main, resources
from .resources import every_case as cases
from .resources import measure as inspect
from .resources import measure_all as inspect_all

__all__ = ["TARGETS", "Case", "Resources", "cases", "compile_only", "inspect", "inspect_all", "main", "resources"]

if __name__ == "__main__":
    main()
