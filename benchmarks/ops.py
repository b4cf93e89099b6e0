"""Rows of the ops alone, at the shapes of the published models.

A row counts the bytes of each input once and of each output once, and the operations of the formula: causal attention
those at and below the diagonal, its backward 2.5 times as many. A GPU runs bfloat16 attention, large batches and all
shapes; a CPU float32, small batches and the shapes that take seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from row import BACKENDS, Contender, Outputs, Row, Run
from tarflow_kernels import (
    KVCache,
    affine_forward,
    affine_inverse,
    causal_attention,
    decode_attention,
    mixture_logistic,
    mixture_logistic_inverse,
    reference,
    use_backend,
)


@dataclass(frozen=True)
class Published:
    """The part of a published model that ops see: N tokens of D values, heads of 64."""

    name: str
    tokens: int
    heads: int
    token_dim: int


PUBLISHED = (
    Published("ImageNet64 patch 2", tokens=1024, heads=12, token_dim=12),
    Published("ImageNet64 patch 4", tokens=256, heads=12, token_dim=48),
    Published("ImageNet128 patch 4", tokens=1024, heads=16, token_dim=48),
    Published("AFHQ256 patch 8", tokens=1024, heads=12, token_dim=192),
)
HEAD_DIM = 64


@dataclass(frozen=True)
class Coupling:
    """The part of a Flow++ coupling (arXiv 1902.00275) that a mixture sees: the half it transforms, K components."""

    name: str
    channels: int
    height: int
    width: int
    components: int


COUPLINGS = (
    Coupling("Flow++ CIFAR-10", channels=3, height=32, width=16, components=32),
    Coupling("Flow++ ImageNet64", channels=12, height=32, width=16, components=4),
)


def op_rows(device: torch.device) -> list[Row]:
    """List the rows of the ops alone, on a device."""
    if device.type == "cuda":
        return rows_of(PUBLISHED, COUPLINGS, Amounts(32768, 32, 64 * 2**20, 64), torch.bfloat16)
    return rows_of(PUBLISHED[:2], COUPLINGS, Amounts(2048, 2, 16 * 2**20, 8), torch.float32)


@dataclass(frozen=True)
class Amounts:
    """How much an op gets at once: tokens to attend, rows to decode, bytes of a tensor to map, samples of a mixture."""

    tokens: int
    rows: int
    tensor_bytes: int
    samples: int


def rows_of(
    shapes: Sequence[Published], couplings: Sequence[Coupling], amounts: Amounts, dtype: torch.dtype
) -> list[Row]:
    """List the rows of ops at some shapes; attention is of the dtype, and all else of float32."""
    attended = [shape for shape in shapes if shape.name != "AFHQ256 patch 8"]  # attends as ImageNet64 patch 2 does
    return [
        *(_causal_attention(shape, amounts.tokens // shape.tokens, dtype, way) for shape in attended for way in _WAYS),
        *(_decode(shape, amounts.rows, new, dtype) for shape in attended for new in (1, 16)),
        *(_affine(shape, amounts.tensor_bytes, case) for shape in shapes for case in AFFINE),
        *(_mixture(coupling, amounts.samples, case) for coupling in couplings for case in MIXTURE),
    ]


@dataclass(frozen=True)
class Inputs:
    """Tensors, and the gradients of the outputs where the backward is measured."""

    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    def double(self) -> "Inputs":
        """Return the same numbers in float64."""
        return Inputs(tuple(t.double() for t in self.tensors), tuple(g.double() for g in self.gradients))


def _forward(function: Callable, inputs: Inputs) -> Run:
    return lambda: _as_tuple(function(*inputs.tensors))


def _backward(function: Callable, inputs: Inputs) -> Run:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    # A compiled backward would else free what the next run of it needs.
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = _as_tuple(function(*leaves))
    return lambda: torch.autograd.grad(outputs, leaves, inputs.gradients, retain_graph=True)


_WAYS = {"forward": _forward, "backward": _backward}


def _contenders(op: Callable, formula: Callable, way: Callable) -> dict[str, Contender]:
    """Our backends, the formula in plain torch, and the formula compiled."""
    return {
        **{name: Contender(partial(way, op), partial(use_backend, name)) for name in (*BACKENDS, "reference")},
        "compiled reference": Contender(lambda inputs: way(torch.compile(formula, dynamic=False), inputs)),
    }


def _impossible(reason: str) -> Contender:
    """A contender that says why it cannot run."""

    def prepare(inputs: Any) -> Run:
        raise NotImplementedError(reason)

    return Contender(prepare)


def _exactly(formula: Callable, way: Callable) -> Callable[[Inputs], Outputs]:
    return lambda inputs: way(formula, inputs.double())()


def _sdpa_contenders(function: Callable, prepare: Callable) -> dict[str, Contender]:
    """PyTorch's attention with each of its backends."""
    backends = {
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
        "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return {
        name: Contender(partial(prepare, function), partial(sdpa_kernel, backend)) for name, backend in backends.items()
    }


def _causal_attention(shape: Published, batch: int, dtype: torch.dtype, direction: str) -> Row:
    way = _WAYS[direction]
    sizes = {"B": batch, "H": shape.heads, "N": shape.tokens, "D": HEAD_DIM}

    def draw(device: torch.device) -> Inputs:
        fused = torch.randn(batch, shape.tokens, 3, shape.heads, HEAD_DIM, device=device, dtype=dtype)
        q, k, v = (part.transpose(1, 2) for part in fused.unbind(2))
        return Inputs((q, k, v), (torch.randn_like(q),))

    pairs = batch * shape.heads * shape.tokens * (shape.tokens + 1) / 2
    tensors = 4 if direction == "forward" else 8  # q, k, v, out; and the gradients of these
    return Row(
        op="causal_attention" if direction == "forward" else "causal_attention backward",
        model=shape.name,
        shape=sizes,
        dtype=dtype,
        bytes=tensors * batch * shape.heads * shape.tokens * HEAD_DIM * dtype.itemsize,
        operations=4 * pairs * HEAD_DIM * (1 if direction == "forward" else 2.5),
        contenders=_contenders(causal_attention, reference.causal_attention, way)
        | _sdpa_contenders(partial(F.scaled_dot_product_attention, is_causal=True), way),
        draw=draw,
        expect=_exactly(reference.causal_attention, way),
    )


@dataclass(frozen=True)
class Case:
    """An element-wise op in one direction, and the costs of a value.

    Attributes:
        way: of the direction, forward or backward.
        numbers: how many numbers it moves for each value, beside those of mixtures.
        operations: for each value, of a mixture for each component of a value.
        parameters: how many numbers it moves for each component of a mixture.
    """

    name: str
    way: Callable
    op: Callable
    formula: Callable
    numbers: int
    operations: int
    parameters: int = 0


_affine_forward, _affine_inverse = partial(affine_forward, shift=True), partial(affine_inverse, shift=True)
_formula_forward = partial(reference.affine_forward, shift=True)
_formula_inverse = partial(reference.affine_inverse, shift=True)
AFFINE = (
    Case("affine_forward", _forward, _affine_forward, _formula_forward, 4, 4),
    # It saves z, and needs neither x nor mu.
    Case("affine_forward backward", _backward, _affine_forward, _formula_forward, 6, 5),
    Case("affine_inverse", _forward, _affine_inverse, _formula_inverse, 4, 4),
)


def _affine(shape: Published, tensor_bytes: int, case: Case) -> Row:
    # A multiple of 32 samples, at which a float32 tensor has about that many bytes.
    batch = -(-tensor_bytes // (32 * 4 * shape.tokens * shape.token_dim)) * 32
    sizes = batch, shape.tokens, shape.token_dim

    def draw(device: torch.device) -> Inputs:
        """Parameters as a model's last projection gives them: the halves of one tensor."""
        x = torch.randn(sizes, device=device)
        alpha, mu = (0.3 * torch.randn(*sizes[:2], 2 * shape.token_dim, device=device)).chunk(2, dim=-1)
        return Inputs((x, mu, alpha), (torch.randn_like(x), torch.randn(batch, device=device)))

    values = math.prod(sizes)
    return Row(
        op=case.name,
        model=shape.name,
        shape=dict(zip("BND", sizes, strict=True)),
        dtype=torch.float32,
        bytes=4 * values * case.numbers,
        operations=values * case.operations,
        contenders=_contenders(case.op, case.formula, case.way),
        draw=draw,
        expect=_exactly(case.formula, case.way),
    )


_mixture_formula, _inverse_formula = reference.mixture_logistic, reference.mixture_logistic_inverse
MIXTURE = (
    Case("mixture_logistic", _forward, mixture_logistic, _mixture_formula, 2, 25, parameters=3),
    Case("mixture_logistic backward", _backward, mixture_logistic, _mixture_formula, 3, 60, parameters=6),
    # It is counted as five evaluations.
    Case("mixture_logistic_inverse", _forward, mixture_logistic_inverse, _inverse_formula, 2, 125, parameters=3),
)


def _mixture(coupling: Coupling, batch: int, case: Case) -> Row:
    components = coupling.components
    sizes = batch, coupling.channels, coupling.height, coupling.width

    def draw(device: torch.device) -> Inputs:
        """Parameters as a convolution gives them: every channel's are channels of its output."""
        outputs = torch.randn(batch, coupling.channels, 2 + 3 * components, *sizes[2:], device=device)
        theta = outputs[:, :, 2:].movedim(2, -1).chunk(3, dim=-1)
        x = torch.randn(sizes, device=device)
        return Inputs((x, *theta), (torch.randn_like(x), torch.randn(batch, device=device)))

    contenders = _contenders(case.op, case.formula, case.way)
    if case.op is mixture_logistic_inverse:
        contenders["compiled reference"] = _impossible("the reference takes 64 steps, which a compiler would write out")
    else:
        # Compilers on a CPU have less exact logarithms.
        contenders["compiled reference"] = replace(contenders["compiled reference"], allowance=1e-5)
    values = math.prod(sizes)
    return Row(
        op=case.name,
        model=coupling.name,
        shape=dict(zip("BCHW", sizes, strict=True)) | {"K": components},
        dtype=torch.float32,
        bytes=4 * values * (case.parameters * components + case.numbers),
        operations=case.operations * values * components,
        contenders=contenders,
        draw=draw,
        expect=_exactly(case.formula, case.way),
        note="parameters are views of the output of a convolution, channels first",
    )


LAYERS = 8


@dataclass(frozen=True)
class DecodeInputs:
    """New tokens, the full caches of the layers, and where the new tokens go: at the end."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: KVCache
    positions: Tensor

    def double(self) -> "DecodeInputs":
        """Return the same numbers in float64."""
        cache = KVCache(self.cache.keys.double(), self.cache.values.double())
        return DecodeInputs(self.q.double(), self.k.double(), self.v.double(), cache, self.positions)


def _layer_by_layer(function: Callable, inputs: DecodeInputs) -> Run:
    q, k, v, positions = inputs.q, inputs.k, inputs.v, inputs.positions
    return lambda: ([function(q, k, v, *keys_and_values, positions) for keys_and_values in inputs.cache],)


def _sdpa_against_cache(q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, positions: Tensor) -> Tensor:
    """Attend as one would write it where the host knows the positions: the caches are full."""
    new, capacity = q.shape[2], cache_k.shape[2]
    cache_k[:, :, capacity - new :] = k
    cache_v[:, :, capacity - new :] = v
    mask = causal_lower_right(new, capacity) if new > 1 else None
    return F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=mask)


def _decode(shape: Published, rows: int, new: int, dtype: torch.dtype) -> Row:
    def draw(device: torch.device) -> DecodeInputs:
        q, k, v = torch.randn(rows, 3, shape.heads, new, HEAD_DIM, device=device, dtype=dtype).unbind(1)
        cache = KVCache.allocate(LAYERS, rows, shape.heads, shape.tokens, HEAD_DIM, device=device, dtype=dtype)
        cache.keys.normal_()
        cache.values.normal_()
        positions = torch.full((rows,), shape.tokens - new, dtype=torch.int32, device=device)
        return DecodeInputs(q, k, v, cache, positions)

    def compiled(inputs: DecodeInputs) -> Run:
        if inputs.q.device.type == "cpu":
            raise NotImplementedError("the torch implementation reads the positions on a CPU")
        return _layer_by_layer(torch.compile(decode_attention, dynamic=False), inputs)

    ours = partial(_layer_by_layer, decode_attention)
    seen = new * (shape.tokens - new) + new * (new + 1) / 2  # by the new tokens of a head
    per_head = 2 * shape.tokens + 2 * new + 2 * new  # keys and values; the new ones written; q and out
    return Row(
        op="decode_attention",
        model=shape.name,
        shape={"B": rows, "H": shape.heads, "N": shape.tokens, "D": HEAD_DIM, "G": new},
        dtype=dtype,
        bytes=rows * shape.heads * HEAD_DIM * per_head * dtype.itemsize,
        operations=4 * rows * shape.heads * HEAD_DIM * seen,
        contenders={
            **{name: Contender(ours, partial(use_backend, name)) for name in BACKENDS},
            "reference": Contender(ours, partial(use_backend, "reference"), graph=False),
            "compiled reference": _impossible("the reference loops over rows whose positions it reads"),
            "compiled torch": Contender(compiled, partial(use_backend, "torch")),
        }
        | _sdpa_contenders(_sdpa_against_cache, _layer_by_layer),
        draw=draw,
        expect=lambda inputs: _layer_by_layer(reference.decode_attention, inputs.double())(),
        launches=LAYERS,
        graph=True,
        note=f"{LAYERS} layers in turn, each with its own cache",
    )


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
