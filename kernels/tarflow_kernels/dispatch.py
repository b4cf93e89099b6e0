"""Which implementation of an op runs: the device picks, and only ``use_backend`` overrides it."""

import contextlib
from collections.abc import Callable, Iterator

import torch

BACKENDS = ("reference", "torch", "triton")

_library = torch.library.Library("tarflow", "DEF")
_implementations: dict[str, dict[str, Callable]] = {}
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on one backend, whatever the device.

    Args:
        name: ``"reference"`` (the formula, readable and slow), ``"torch"`` (stock PyTorch operators, any device) or
            ``"triton"`` (CUDA, ROCm and XPU devices, or the Triton interpreter).

    The choice holds for the whole process, because autograd runs backward passes on threads of its own. Under
    ``torch.compile`` it is fixed when the function is traced, and a change of it makes a new trace.

    Raises:
        ValueError: ``name`` is none of these.
        NotImplementedError: an op is called that has no implementation for the backend.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}; got {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def register(schema: str, *, fake: Callable | None = None, **implementations: Callable) -> None:
    """Define ``tarflow::<schema>`` with one implementation per backend, each taking the arguments of the schema.

    The ``torch`` implementation serves every device for which no kernel is registered. A differentiable op is made of
    differentiable operators, so it needs neither ``fake`` nor a backward of its own; an op that mutates its arguments
    is opaque to autograd and to the compiler, and must bring ``fake``.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    if fake is None:
        _library.impl(name, implementations["torch"], "CompositeImplicitAutograd")
    else:
        _library.impl(name, implementations["torch"], "CompositeExplicitAutograd")
        torch.library.register_fake(f"tarflow::{name}", fake, lib=_library)
    _implementations[name] = implementations


def call(name: str, *args):
    """Run op ``name`` on the backend in force.

    Only a compiler needs the registered op; in eager mode the implementation is called as it is, since going through
    the dispatcher costs some ten microseconds, a good part of a decoding step on a CPU.
    """
    if _forced is None and torch.compiler.is_compiling():
        return getattr(torch.ops.tarflow, name).default(*args)
    backend = _forced or "torch"
    if backend not in _implementations[name]:
        raise NotImplementedError(f"{name} has no {backend} implementation; it has {', '.join(_implementations[name])}")
    return _implementations[name][backend](*args)
