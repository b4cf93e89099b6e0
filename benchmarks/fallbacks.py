"""Ever safer configurations of kernels, for a card on which the usual ones do not work.

They are made from the configuration that a launcher would take, one level after the other.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Config = dict[str, int]
LEVELS = ("as chosen", "one stage", "four warps", "small tiles")
# The largest tile along tokens, and along elements, of the last level.
_LARGEST = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK": 128}

# The levels at which kernels are known to work on this card, by families.
known: dict[str, int] = {}
_at = 0
_notes: list[dict[str, Config]] = []


def safer(config: Config, level: int) -> Config:
    """Make a configuration safer: without a limit of registers and with one stage, of four warps, of small tiles.

    >>> safer({"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128}, 1)
    {'BLOCK_M': 128, 'BLOCK_N': 64, 'num_warps': 8, 'num_stages': 1}
    >>> safer({"BLOCK": 1024, "num_warps": 8}, 3)
    {'BLOCK': 128, 'num_warps': 4}

    Raises:
        RuntimeError: there is no such level, since the last did not work either.
    """
    if level >= len(LEVELS):
        raise RuntimeError("none of its configurations works on this card")
    config = dict(config)
    if level >= 1:
        config.pop("maxnreg", None)
        config |= {"num_stages": 1} if "num_stages" in config else {}
    if level >= 2:
        config["num_warps"] = min(config["num_warps"], 4)
    if level >= 3:
        config |= {name: min(config[name], largest) for name, largest in _LARGEST.items() if name in config}
    return config


def next_level(configs: dict[str, Config], level: int) -> int | None:
    """The next level at which one of these configurations becomes another, if there is one."""
    levels = range(level + 1, len(LEVELS))
    return next((n for n in levels if any(safer(c, n) != safer(c, n - 1) for c in configs.values())), None)


@contextlib.contextmanager
def at(level: int) -> Iterator[None]:
    """Make all configurations safer within the block."""
    global _at
    previous, _at = _at, level
    try:
        yield
    finally:
        _at = previous


@contextlib.contextmanager
def noted() -> Iterator[dict[str, Config]]:
    """Note the configurations that launchers take within the block, by ``kernel:key``."""
    notes: dict[str, Config] = {}
    _notes.append(notes)
    try:
        yield notes
    finally:
        _notes.pop()


def family(name: str) -> str:
    """Name the configurations of a kernel that are alike: those of a dtype.

    >>> family("causal_attention_forward:bfloat16,d64,n1024")
    'causal_attention_forward:bfloat16'
    """
    return name.partition(",")[0]


def learn(names: Iterable[str], level: int) -> None:
    """Remember at which level configurations work, for all of their families; what was tuned works without."""
    for name in names:
        known[family(name)] = max(level, known.get(family(name), 0))


def known_level(names: Iterable[str]) -> int:
    """The level at which a launch of these configurations begins."""
    return max((known.get(family(name), 0) for name in names), default=0)


def watch(hear: Callable[[str, Config], Any] = lambda name, config: None) -> None:
    """Stand between the launchers of this process and their configurations; ``hear`` each before it is launched."""
    if importlib.util.find_spec("triton") is None:
        return
    from tarflow_kernels.triton import configs

    choose = configs.choose

    def watched(kernel: str, key: str, fallback: Config) -> Config:
        name = f"{kernel}:{key}"
        config = safer(choose(kernel, key, safer(fallback, known_level([name]))), _at)
        for notes in _notes:
            notes[name] = config
        hear(name, config)
        return config

    configs.choose = watched
