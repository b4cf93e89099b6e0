"""The choice of the implementation that runs for an op: the device picks, and only ``use_backend`` overrides it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import library

from ._ops import add_op_namespace_prefix, ops

__all__ = ["BACKENDS", "can_be_captured", "chosen", "implementations", "pick", "use_backend"]

BACKENDS = ("reference", "torch", "triton")
implementations: dict[str, dict[str, Callable]] = {}
"""The functions that run, by op and backend; a test puts others in their place."""

_library = library.Library(ops.name, "DEF")
_serves: dict[str, Callable[..., bool]] = {}
_opaque: set[str] = set()
_has_triton = importlib.util.find_spec("triton") is not None


class _Choice(threading.local):
    """The backend asked for in this thread. Compilers cannot trace a ``ContextVar``."""

    def __init__(self) -> None:
        self.backend: str | None = None


_choice = _Choice()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op that this thread calls inside the ``with`` block on one backend, whatever the device.

    Args:
        name: ``"reference"`` (the formula, readable and slow), ``"torch"`` (stock PyTorch operators, any device) or
            ``"triton"`` (CUDA, ROCm and XPU devices, or the Triton interpreter).

    Other threads are left alone. A backward pass, which autograd may run on a thread of its own, is that of the backend
    that ran forward, wherever it is called. Only ``torch.utils.checkpoint``, which runs the forward pass again there,
    must be told, by its ``context_fn=lambda: (use_backend(name), use_backend(name))``. Under ``torch.compile`` the
    choice is fixed when the function is traced, and a change of it makes a new trace.

    Raises:
        ValueError: ``name`` is none of these.
        NotImplementedError: an op is called that cannot run on the backend: it has no implementation for it, or one
            that does not take such arguments; Triton is not installed, or the tensors are on a CPU and it does not
            interpret (``TRITON_INTERPRET=1`` in the environment of the process); the reference is asked for while a
            CUDA graph is captured.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}; got {name!r}")
    previous, _choice.backend = _choice.backend, name
    try:
        yield
    finally:
        _choice.backend = previous


def chosen() -> str | None:
    """The backend that :func:`use_backend` has put in force in this thread, if any."""
    return _choice.backend


def can_be_captured() -> bool:
    """Whether a CUDA graph can hold the ops that this thread calls: not the reference, which waits for the device."""
    return chosen() != "reference"


def register(
    schema: str, *, fake: Callable | None = None, serves: Callable[..., bool] | None = None, **of_backends: Callable
) -> None:
    """Define ``tarflow::<schema>`` with one implementation per backend, each taking the arguments of the schema.

    On a GPU the ``triton`` implementation runs where ``serves(*args)`` holds, and the ``torch`` implementation
    everywhere else. A differentiable op is made of differentiable operators, kernels inside an
    ``autograd.Function`` among them, so it needs neither ``fake`` nor a backward of its own; an op that mutates its
    arguments is opaque to autograd and to the compiler, and must bring ``fake``.
    """
    name = schema.partition("(")[0]

    def run(*args):
        return _run(name, args)

    _library.define(schema)
    if fake is None:
        _library.impl(name, run, "CompositeImplicitAutograd")
    else:
        _library.impl(name, run, "CompositeExplicitAutograd")
        library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
        _opaque.add(name)
    implementations[name] = of_backends
    _serves[name] = serves or (lambda *args: True)


def register_kernel(schema: str, *, module: str, fake: Callable) -> Callable:
    """Define ``tarflow::<schema>``, opaque to compilers, as the launcher of that name in ``triton/<module>.py``."""
    return register_opaque(schema, launcher(module, schema.partition("(")[0]), fake=fake)


def register_opaque(schema: str, run: Callable, *, fake: Callable) -> Callable:
    """Define ``tarflow::<schema>``, which compilers do not look into, as a function on any device."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
    return getattr(ops, name).default


def launcher(module: str, name: str) -> Callable:
    """The launcher of that name in ``triton/<module>.py``, which imports it, and Triton with it, when it first runs.

    It runs on the device of its first tensor: Triton launches on the current one, whatever its arguments are on.
    """

    @functools.cache
    def find() -> Callable:
        return getattr(importlib.import_module(f".triton.{module}", __package__), name)

    def launch(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return find()(*args)

    return launch


def call(name: str, *args: Any) -> Any:
    """Run op ``name`` on the backend in force.

    Only a compiler needs the registered op; in eager mode the implementation is called as it is, since going through
    the dispatcher costs some ten microseconds, a good part of a decoding step on a CPU.
    """
    if torch.compiler.is_compiling() and (chosen() is None or name in _opaque):
        return getattr(ops, name).default(*args)
    return _run(name, args)


def _run(name: str, args: tuple) -> Any:
    backend, of_backends = _choice.backend or pick(name, args), implementations[name]
    if backend not in of_backends:
        raise NotImplementedError(f"{name} has no {backend} implementation; it has {', '.join(of_backends)}")
    if backend == "triton":
        _check_triton(name, args)
    elif backend == "reference" and args[0].is_cuda:
        _check_capture(name)
    return of_backends[backend](*args)


def pick(name: str, args: tuple) -> str:
    """Pick the backend of an op for its arguments: that of their device, where it has a kernel for them."""
    if not args[0].is_cpu and _has_triton and "triton" in implementations[name]:
        on_gpu = args[0].device.type in ("cuda", "xpu")  # ROCm calls itself cuda
        return "triton" if on_gpu and _serves[name](*args) else "torch"
    return "torch"


def _check_capture(name: str) -> None:
    """Refuse the reference while the capture is whole: PyTorch 2.11 leaves the stream in one that has failed."""
    if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(f"{name}: the reference backend waits for the device, so no CUDA graph can hold it")


def _check_triton(name: str, args: tuple) -> None:
    """Refuse Triton where it does not work, which happens only where it was asked for by name."""
    if not _has_triton:
        raise NotImplementedError("Triton is not installed; try: pip install triton")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if args[0].is_cpu and not interpreted:
        raise NotImplementedError(
            f"{name}: the triton backend needs tensors on a GPU, or TRITON_INTERPRET=1 in the environment of the "
            "process; got tensors on a CPU"
        )
    if not _serves[name](*args):
        shapes = ", ".join(f"{tuple(arg.shape)} {arg.dtype}" for arg in args if isinstance(arg, torch.Tensor))
        raise NotImplementedError(f"{name} has no kernel for {shapes}; its torch implementation takes them")
