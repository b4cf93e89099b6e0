"""Runs the doctests of an installed package with nothing but the standard library: python doctests.py PACKAGE.

Modules on top of libraries that are not installed are left out, by name.
"""

import doctest
import importlib
import pkgutil
import sys


def main(name: str) -> int:
    """Print what was run; the exit status is 1 where a doctest fails or there is none."""
    package = importlib.import_module(name)
    attempted, left_out = 0, []
    for found in pkgutil.walk_packages(package.__path__, f"{name}.", onerror=lambda module: None):
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if str(error.name).startswith(name):
                raise
            left_out.append(f"{found.name} (needs {error.name})")
            continue
        result = doctest.testmod(module)
        attempted += result.attempted
        if result.failed:
            return 1
    print(f"{name}: {attempted} examples of its docstrings hold", *left_out, sep="\n  left out: ")
    return 0 if attempted else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
