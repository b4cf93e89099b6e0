"""Names and formats of the last release, read for one release more: renamed arguments and flags, and flat settings."""

import functools
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeVar

__all__ = ["current_flags", "current_settings", "renamed_arguments", "renamed_attributes"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def renamed_arguments(**names: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function that still takes arguments by their old names, with a DeprecationWarning: ``old="new"``.

    >>> @renamed_arguments(draws="num_samples")
    ... def score(num_samples=1):
    ...     return num_samples
    >>> with warnings.catch_warnings(action="ignore"):
    ...     score(draws=3)
    3
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def renaming(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
            for old, new in names.items():
                if old not in options:
                    continue
                if new in options:
                    raise TypeError(f"{old}: expected {new} alone, which is its new name; got both")
                warnings.warn(f"{old}: is now called {new}", DeprecationWarning, stacklevel=2)
                options[new] = options.pop(old)
            return function(*arguments, **options)

        return renaming

    return decorate


def renamed_attributes(module: dict[str, Any], **names: str) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module, given by its globals, that finds attributes by their old names.

    >>> find = renamed_attributes({"__name__": "shapes", "Circle": "a circle"}, Disk="Circle")
    >>> with warnings.catch_warnings(action="ignore"):
    ...     find("Disk")
    'a circle'
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        warnings.warn(f"{module['__name__']}.{name}: is now called {names[name]}", DeprecationWarning, stacklevel=2)
        return module[names[name]]

    return find


_FLAGS = {
    "train": {"--guidance": "--guidance.weight", "--score-draws": "--importance-samples"},
    "evaluate": {"--draws": "--importance-samples"},
}


def current_flags(command: str, arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """The arguments of a command that has these flags, with today's names.

    ``--no-conditional`` is left out for a model that has no labels in any case, and so no such flag.

    >>> current_flags("train", ["--guidance=2", "--score_draws", "4", "--no-conditional"], ["--importance-samples"])
    ['--guidance.weight=2', '--importance-samples', '4']
    """
    current = []
    for argument in arguments:
        flag, *value = re.split("(?==)", argument, maxsplit=1)
        if (command, argument) != ("train", "--no-conditional") or argument in flags:
            current.append("".join([_FLAGS.get(command, {}).get(flag.replace("_", "-"), flag), *value]))
    return current


_DATA = ("dataset", "data_dir", "image_size", "resize", "flip", "conditional")
_MODEL = (
    *("model", "coupling", "num_mixtures", "dequantizer", "patch_size", "channels", "num_blocks", "layers_per_block"),
    *("head_dim", "expansion", "volume_preserving", "stack", "filters", "blocks_per_coupling", "attention"),
    *("pointwise", "elu_output", "weight_norm", "dropout"),
)


def current_settings(train: dict[str, Any]) -> dict[str, Any]:
    """The ``train`` of a run's ``config.json`` in today's form: ``data`` and ``training``.

    Once all settings lay side by side, those of the model among them, which ``config.json`` has under ``model`` too;
    ``importance_samples`` was ``score_draws``. Before that, guidance was the weight of label guidance alone, which
    counted for nothing without labels.
    """
    if not train or "training" in train:
        return train
    data = {name: train[name] for name in _DATA if name in train}
    training = {name: value for name, value in train.items() if name not in (*_DATA, *_MODEL)}
    if "score_draws" in training:
        training["importance_samples"] = training.pop("score_draws")
    guidance = training.get("guidance")
    if isinstance(guidance, int | float):
        training["guidance"] = {"weight": guidance if data.get("conditional", True) else 0.0}
    return {"data": data, "training": training}
