"""One pass of a block's transformer over the next G tokens of every row, against a key-value cache made beforehand.

:class:`GuidedBatch` says which rows there are, :class:`StepWeights` what all of them share, :class:`CachedStep` is the
pass, :class:`GraphRunner` repeats it on a GPU without launching its kernels one by one, as a CUDA graph.

**What is captured.** A graph holds addresses. What is in this table stays where it is while the graph lives, and is
made before; everything else lies in the graph's own pool, which is free again when a pass ends.

    ============== ============================================ ============================================
                   sequential                                   Jacobi
    ============== ============================================ ============================================
    captured       the step of every chain, once per block      a pass over the windows, and again whenever
                                                                rows have left the batch
    only read      weights, class context, temperatures, z      the same
    updated        x, h, cache, qkv, hidden layer, positions,   x, cache, qkv, hidden layer, positions,
                   tickets                                      accepted tokens
    ============== ============================================ ============================================

Bytes, for L layers of width C, R rows, windows of G tokens (one in the sequential decoder), and s bytes per element of
the layers, f of the tokens:

    ============== =================================================================================================
    weights        ``12 L C^2 s``, once for all chains
    cache          ``2 L R N C s``
    buffers        ``7 R G C s`` for qkv and the hidden layer, and ``R G C f`` for h of the sequential decoder
    pool           ``4 R G C s``, ``R G C f`` more where a pass embeds its tokens anew (Jacobi, mixtures), and
                   ``4 S R G C`` where few rows and heads have their cache cut in S splits; at least 2 MB per stream
    ============== =================================================================================================

How the rules of capture are kept:

- *Nothing is set up inside.* The first calls run on the streams that capture later, so that kernels are compiled and
  libraries have their workspaces, of which they keep one for every stream.
- *Nothing waits for the device*, and no pass draws random numbers, for which a generator would have to be registered.
- *Any stream may call.* The work begins after what the caller's stream holds, and that stream goes on after it.
- *Other threads go on.* Their work is not captured and does not disturb, and captures of several threads take turns. A
  thread that synchronizes the whole device meanwhile, or empties PyTorch's cache of memory, gets an error.
- *Errors leave nothing behind.* Where a pass raises, all streams are joined and the caller's is current again; the next
  call captures anew. (After a call that CUDA forbids in a capture, PyTorch's allocator would stay in it. There is none
  in a pass, and the reference, which reads positions, is never captured.)
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow_kernels import KVCache, dispatch

from ..guidance import Guidance, divide_densities, extrapolate, extrapolate_scale
from ..transformer import NO_CONTEXT, CausalTransformer, Context, TransformerLayer
from ..transforms import MixtureTransform, Parameters

__all__ = [
    "CachedStep",
    "DecodingMemory",
    "GraphRunner",
    "GuidedBatch",
    "StepWeights",
    "count_branches",
    "gather_tokens",
    "scatter_tokens",
    "side_streams",
]

FEW_ROWS = 128
"""New tokens in a step up to which, on a CPU in float32, PyTorch's own GELU is faster than oneDNN's."""

# Operators without the checks of their arguments, which fit: on a CPU those would be a tenth of a small step.
_decode_attention = functools.partial(dispatch.call, "decode_attention")
_residual_norm = functools.partial(dispatch.call, "residual_norm")

# Held during a capture: another that begins meanwhile empties PyTorch's cache of memory, which is refused then.
_one_at_a_time = threading.Lock()


def count_branches(guidance: Guidance | None) -> int:
    """Return the number of rows per sample: two under guidance of any weight, else one."""
    return 2 if guidance is not None and guidance.weight else 1


class GuidedBatch:
    """The rows of a decoding batch: B of the conditional branch and, under guidance, B of the reference branch behind.

    Attributes:
        num_branches: 2 under guidance, else 1.
        rows: B, or 2B under guidance.
        context: what is added to the tokens of each row, ``(rows, C)``, and what comes before them, ``(rows, L, C)``;
            None where there is none.
        temperature: temperature of the attention logits, ``(rows,)``, or None where it is 1 for all.
        weights: w_i of guidance for every token, ``(N,)``, or None without guidance.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        z: Tensor,
        context: Context = NO_CONTEXT,
        guidance: Guidance | None = None,
    ):
        batch, num_tokens, _ = z.shape
        self.num_branches = count_branches(guidance)
        self.guidance = guidance if self.num_branches == 2 else None
        self.rows = self.num_branches * batch
        self.temperature: Tensor | None = None
        self.weights: Tensor | None = None
        if self.guidance is not None:
            passed = int(transformer.start_token is not None)  # which is no token of the data
            self.weights = F.pad(self.guidance.weights(num_tokens - passed), (passed, 0)).to(z)
            if self.guidance.temperature != 1:
                taus = transformer.proj_in.weight.new_tensor([1.0, self.guidance.temperature])
                self.temperature = taus.repeat_interleave(batch)
        self.context = Context(*(None if part is None else part.transpose(0, 1).flatten(0, 1) for part in context))
        self.combine = self._choose_rule(transformer)

    def repeat(self, samples: Tensor) -> Tensor:
        """Repeat ``(B, ...)`` for every branch: ``(rows, ...)``."""
        return samples if self.guidance is None else torch.cat((samples, samples))

    def rows_of(self, samples: Tensor, batch: int) -> Tensor:
        """Return the rows of samples, given by their indices in a batch of that size."""
        return samples if self.guidance is None else torch.cat((samples, samples + batch))

    def guide(self, parameters: Parameters, positions: Tensor) -> Parameters:
        """Combine parameters ``(rows, G, ...)`` of all branches, for the tokens at ``positions`` ``(B, G)``."""
        if self.weights is None:
            return parameters
        branches: Any = self.split_branches(parameters)
        return self.combine(*branches, self.weights[positions])

    def branches_to_extrapolate(
        self, parameters: Parameters, positions: Tensor
    ) -> tuple[Parameters, Parameters | tuple[None, ...]]:
        """Split parameters ``(rows, D)`` of the tokens behind ``positions`` ``(rows,)``, for one that extrapolates.

        By any other rule the guided parameters stand for both branches.
        """
        if self.combine is extrapolate:
            return self.split_branches(parameters)
        samples = len(parameters[0]) // self.num_branches
        guided = self.guide(parameters, positions[:samples].long() + 1)
        return guided, guided

    def _choose_rule(self, transformer: CausalTransformer) -> Callable[..., Parameters]:
        if self.guidance is None or isinstance(transformer.transform, MixtureTransform):
            return extrapolate
        if self.guidance.rule == "gaussian":
            return divide_densities
        return extrapolate if transformer.noise_embed is None else extrapolate_scale

    def split_branches(self, parameters: Parameters) -> tuple[Parameters, Parameters | tuple[None, ...]]:
        """Split parameters of all rows into those of the conditional and of the reference branch, None without one.

        Where one of mu and alpha is not guided, its reference is itself.
        """
        if self.guidance is None:
            return parameters, (None,) * len(parameters)
        conditional, reference = zip(*(v.chunk(2) for v in parameters), strict=True)
        if self.guidance.parameters == "alpha":
            reference = conditional[0], *reference[1:]
        elif self.guidance.parameters == "mu":
            reference = reference[0], *conditional[1:]
        return conditional, reference


class StepWeights:
    """The weights of a :class:`CausalTransformer` as a step reads them: cast and laid out once, whatever the rows.

    The layers run in the dtype of the autocast in force, or else in that of the weights; residuals, norms and the
    projections at both ends in that of the tokens.

    Args:
        transformer: the transformer of the block.
        dtype: dtype of the tokens, float32 or float64.
        num_tokens: number of tokens, a start token included.
    """

    def __init__(self, transformer: CausalTransformer, dtype: torch.dtype, num_tokens: int):
        weight, layers = transformer.proj_in.weight, list[Any](transformer.layers)
        autocast = torch.is_autocast_enabled(weight.device.type)
        self.dtype = dtype
        self.layer_dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        self.head_dim, self.hidden_channels = layers[0].head_dim, layers[0].mlp[0].out_features
        self.split = transformer.transform.split
        self.layers = [_LayerWeights(layer, dtype, self.layer_dtype) for layer in layers]
        self.proj_in, bias = _prepare(transformer.proj_in, dtype)
        self.proj_out, self.proj_out_bias = _prepare(transformer.proj_out, dtype)
        norm = transformer.final_norm
        self.final_norm = None if norm is None else 1 + norm.to(dtype)
        self.embedding = bias.repeat(num_tokens, 1)
        if transformer.pos_embed is not None:
            self.embedding[: len(transformer.pos_embed)] += transformer.pos_embed
        self.rotary = transformer.rotary


class CachedStep:
    """The pass of a :class:`CausalTransformer` over G new tokens per row, given all the earlier ones.

    The cache and the activations that outlive an operator have fixed buffers, so that a step allocates nothing but what
    its operators return. Where there is a prefix, its keys and values are the first in the cache, once and for all.

    *Launches on a GPU.* Eight per layer: residual and norm, qkv, append and attend (one more where rows and heads are
    too few to fill the card, and the cache is split), output projection, residual and norm, the two products of the MLP
    and the GELU between them. Around the L layers three more: the last residual, the projection to mu and alpha, the
    guided affine map with the embedding of the next token and its position: ``8 L + 3``, 67 for eight layers. With a
    mixture transform guidance, map and embedding are operators of their own, and 20 in place of three. A block of
    STARFlow takes ``9 L + 10``, for rotary positions, the last norm and its scale, and in bfloat16 two more per layer.

    *Bytes.* The weights of the layers once, ``12 L C^2`` elements, and the cache once, ``2 L R n C`` elements at
    position n; everything else, some ``30 L R C`` elements of activations, is small beside them and stays on the chip.

    Args:
        weights: those of the transformer.
        batch: the rows that are decoded.
        window: the largest G.
        memory: where the cache is to be; only one step at a time may use it.
        caches: the keys and values of a step that has run already, to go on with.

    Attributes:
        positions: int32 ``(R,)``, where the first new token of each row stands, from 0; whoever decodes moves it.
    """

    def __init__(
        self,
        weights: StepWeights,
        batch: GuidedBatch,
        window: int = 1,
        memory: "DecodingMemory | None" = None,
        caches: list[tuple[Tensor, Tensor]] | None = None,
    ):
        (num_tokens, channels), device, low = weights.embedding.shape, weights.embedding.device, weights.layer_dtype
        rows, num_layers = batch.rows, len(weights.layers)
        self.weights = weights
        self.heads, self.head_dim = channels // weights.head_dim, weights.head_dim
        added, prefix = batch.context
        self.context = None if added is None else added.to(weights.dtype)
        self.temperature = batch.temperature
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self.before = 0 if prefix is None else prefix.shape[1]
        shape = num_layers, rows, self.heads, self.before + num_tokens, self.head_dim
        self.offsets = torch.arange(window, dtype=torch.int32, device=device)
        rotary = weights.rotary
        table = None if rotary is None else rotary.table(weights.embedding, self.before, num_tokens)
        self.rotation = None if table is None else torch.complex(*table)
        if caches is not None:
            self.caches = caches
        else:
            self.caches = list((memory or DecodingMemory()).cache(*shape, device=device, dtype=low))
            if prefix is not None:
                self._fill(prefix.to(weights.dtype, copy=True))
        self._make_buffers(rows * window)

    def __call__(self, tokens: Tensor) -> Parameters:
        """Compute the parameters ``(R, G, ...)`` of the tokens that follow each of ``(R, G, D)`` at ``positions``.

        The positions are on the device alone, so that one CUDA graph serves every step.
        """
        parameters = self.run_layers(self.embed(tokens))
        return tuple(parameter.unflatten(0, tokens.shape[:2]) for parameter in parameters)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens ``(R, G, D)`` at ``positions``: the first activations, ``(R, G, C)``."""
        h = F.embedding(self.positions[:, None] + self.offsets[: tokens.shape[1]], self.weights.embedding)
        if self.context is not None:
            h += self.context[:, None]
        h.flatten(0, 1).addmm_(tokens.flatten(0, 1), self.weights.proj_in)
        return h

    def run_layers(self, h: Tensor) -> Parameters:
        """Map the first activations ``(R, G, C)``, which are overwritten, to parameters of the map, ``(R G, ...)``."""
        weights = self.weights
        places = self.positions + self.before if self.before else self.positions
        h, delta = self._attend(h, places)
        h.add_(delta)
        if weights.final_norm is not None:
            h = F.rms_norm(h, h.shape[-1:], weights.final_norm, eps=1e-6)
        return weights.split(torch.addmm(weights.proj_out_bias, h, weights.proj_out))

    def _attend(self, h: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layers over ``(R, G, C)`` from their places in the cache on; the result is the sum of two tensors."""
        (rows, new, _), weights = h.shape, self.weights
        rotation = None if self.rotation is None else self._rotation_at(places, new)
        qkv, hidden, activation, pairs, q, k, v = self._buffers(rows, new)
        h, scale = h.flatten(0, 1), self.head_dim**-0.5
        delta: Tensor | None = None
        for layer, (cache_k, cache_v) in zip(weights.layers, self.caches, strict=True):
            y = _residual_norm(h, delta, *layer.attention_norm, qkv.dtype)
            torch.addmm(layer.qkv_bias, y, layer.qkv, out=qkv)
            if rotation is not None:
                _turn(pairs, rotation)
            attended = _decode_attention(q, k, v, cache_k, cache_v, places, self.temperature, scale)
            joined = attended.flatten(1) if new == 1 else attended.transpose(1, 2).reshape(h.shape)
            delta = torch.addmm(layer.proj_bias, joined, layer.proj)
            y = _residual_norm(h, delta, *layer.mlp_norm, qkv.dtype)
            torch.addmm(layer.up_bias, y, layer.up, out=hidden)
            torch.ops.aten.gelu_(activation)
            delta = torch.addmm(layer.down_bias, hidden, layer.down)
        assert delta is not None, "a transformer has a layer at least"
        return h, delta

    def _rotation_at(self, places: Tensor, new: int) -> Tensor:
        """Return ``exp(i angle)`` of G tokens from each place on, ``(R, G, 1, 1, head_dim / 2)``."""
        assert self.rotation is not None
        at = places if new == 1 else (places[:, None] + self.offsets[:new]).flatten()
        return self.rotation.index_select(0, at).view(len(places), new, 1, 1, self.rotation.shape[1])

    def _fill(self, prefix: Tensor) -> None:
        """Put keys and values of a prefix ``(R, L, C)``, which is overwritten, into the cache."""
        self.offsets, offsets = torch.arange(self.before, dtype=torch.int32, device=prefix.device), self.offsets
        self._make_buffers(len(prefix) * self.before)
        self._attend(prefix, torch.zeros_like(self.positions))
        self.offsets = offsets

    def _make_buffers(self, size: int) -> None:
        """Make buffers for so many new tokens in all rows."""
        like = self.positions.new_empty(0, dtype=self.weights.layer_dtype)
        self.qkv = like.new_empty(size, 3 * self.heads * self.head_dim)
        self.hidden = like.new_empty(size, self.weights.hidden_channels)
        self.shape: tuple[int, int] | None = None

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.positions = self.positions[rows]
        self.caches = [(keys[rows], values[rows]) for keys, values in self.caches]
        if self.context is not None:
            self.context = self.context[rows]
        if self.temperature is not None:
            self.temperature = self.temperature[rows]

    def _buffers(self, rows: int, new: int) -> tuple[Any, ...]:
        """Return the buffers of qkv and of the hidden layer for so many tokens, and their views for the operators."""
        if self.shape != (rows, new):
            qkv, hidden = self.qkv[: rows * new], self.hidden[: rows * new]
            heads = qkv.view(rows, new, 3, self.heads, self.head_dim)
            pairs = None if self.rotation is None else _pairs(heads[:, :, :2])
            views = self._gelu_view(hidden), pairs, *heads.permute(2, 0, 3, 1, 4).unbind()
            self.shape, self.views = (rows, new), (qkv, hidden, *views)
        return self.views

    def _gelu_view(self, hidden: Tensor) -> Tensor:
        """Return the hidden layer as the GELU takes it: for few float32 rows on a CPU, a view that is not contiguous.

        oneDNN takes longer to set itself up than it saves of such a GELU, and leaves tensors that are not contiguous to
        PyTorch. (It can be turned off, but only for all threads of the process.)
        """
        few = hidden.is_cpu and hidden.dtype == torch.float32 and len(self.hidden) <= FEW_ROWS
        return hidden.view(2, -1).transpose(0, 1) if few and hidden.numel() % 2 == 0 else hidden


class _LayerWeights:
    """The weights of a layer: norms in the dtype of the residuals, products in the dtype in which they run."""

    def __init__(self, layer: TransformerLayer, residuals: torch.dtype, dtype: torch.dtype):
        self.attention_norm = _norm(layer.attention_norm, residuals)
        self.qkv, self.qkv_bias = _prepare(layer.qkv, dtype)
        self.proj, self.proj_bias = _prepare(layer.proj, dtype)
        self.mlp_norm = _norm(layer.mlp_norm, residuals)
        up, _, down = layer.mlp
        self.up, self.up_bias = _prepare(up, dtype)
        self.down, self.down_bias = _prepare(down, dtype)


def _norm(norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return weight, bias and epsilon of a layer norm."""
    return norm.weight.to(dtype), norm.bias.to(dtype), norm.eps


def _prepare(linear: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weight and bias as addmm reads them fastest."""
    return linear.weight.to(dtype).t().contiguous(), linear.bias.to(dtype)


def _pairs(x: Tensor) -> Tensor:
    """View pairs of neighbouring channels as complex numbers, which there are in float32 and float64 alone."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.view_as_complex(pairs) if x.dtype in (torch.float32, torch.float64) else pairs


def _turn(pairs: Tensor, rotation: Tensor) -> None:
    """Turn what ``_pairs`` returns in place, as complex numbers; see ``rotate``."""
    if pairs.is_complex():
        pairs.mul_(rotation)
    else:
        turned = torch.view_as_complex(pairs.to(rotation.dtype.to_real())) * rotation
        pairs.copy_(torch.view_as_real(turned))


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Read the tokens ``(B, G, D)`` at ``positions`` ``(B, G)`` of ``(B, N, D)``."""
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[2]))


def scatter_tokens(tokens: Tensor, positions: Tensor, new: Tensor) -> None:
    """Write ``new`` ``(B, G, D)`` to ``positions`` ``(B, G)`` of the tokens ``(B, N, D)``."""
    tokens.scatter_(1, positions[..., None].expand_as(new), new)


class DecodingMemory:
    """Memory that the blocks of a flow, which are decoded in turn, use one after the other: of graphs and of a cache.

    A graph may be replayed until the next is captured. The last one is kept, since a pool whose last graph is gone must
    not be captured into; with this object it goes too, and the pool is PyTorch's to free.

    A cache of new memory costs a CPU a page fault for every 4 kB, 7 % of sampling a batch of 64 from a small model.
    """

    def __init__(self) -> None:
        self.last: torch.cuda.CUDAGraph | None = None
        self.storage: Tensor | None = None

    def cache(self, *shape: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """Return keys and values of a shape ``(L, R, H, N, D)``, in the place of those returned before if they fit."""
        size = 2 * math.prod(shape)
        if self.storage is None or self.storage.numel() < size or self.storage.dtype != dtype:
            self.storage = torch.empty(size, device=device, dtype=dtype)
        return KVCache(*self.storage[:size].view(2, *shape).unbind())

    def capture(self, run: Callable[[], None], stream: "torch.cuda.Stream") -> "torch.cuda.CUDAGraph":
        """Capture what ``run`` launches on this stream."""
        graph, pool = torch.cuda.CUDAGraph(), None if self.last is None else self.last.pool()
        # Where a capture ends in an error, PyTorch (up to 2.13) leaves its stream the current one.
        caller = torch.cuda.stream(torch.cuda.current_stream(stream.device))
        with _one_at_a_time, caller, torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            run()
        self.last = graph
        return graph


class GraphRunner:
    """``runner(*runs)`` calls functions that return nothing and never wait for the device; on CUDA, as one graph.

    They are the same every time, and whatever changes from one call to the next is in tensors that stay where they are.
    Two of them, neither of which touches what the other writes, run side by side, on streams of their own. The first
    calls, in which libraries and compilers set themselves up, run kernel by kernel; then one is captured. No reference
    to ``runs`` is kept, so that their owner may hold this object.

    Args:
        device: where they run.
        memory: that of the graphs before and after this one, if there are any.
    """

    WARM_UP = 2

    def __init__(self, device: torch.device, memory: DecodingMemory | None = None):
        self.device = device
        self.memory = DecodingMemory() if memory is None else memory
        self.on_graph = device.type == "cuda" and dispatch.can_be_captured()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *runs: Callable[[], None]) -> None:
        """Call ``runs``, or replay them."""
        if not self.on_graph:
            for run in runs:
                run()
        elif self.graph is None:
            self._launch_or_capture(runs)
        else:
            self.graph.replay()

    def _launch_or_capture(self, runs: Sequence[Callable[[], None]]) -> None:
        streams = side_streams(self.device, threading.get_ident())
        launch = functools.partial(_run_side_by_side, runs, streams)
        self.calls += 1
        if self.calls <= self.WARM_UP:
            with _forked(streams[0], torch.cuda.current_stream(self.device)):
                launch()
        else:
            self.graph = self.memory.capture(launch, streams[0])
            self.graph.replay()


@functools.cache
def side_streams(device: torch.device, thread: int) -> "tuple[torch.cuda.Stream, torch.cuda.Stream]":
    """Return the two streams on which a thread warms up and captures, always the same: libraries keep workspaces."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _run_side_by_side(runs: Sequence[Callable[[], None]], streams: "Sequence[torch.cuda.Stream]") -> None:
    """Call each on a stream of its own; those behind the first begin after what it holds, and it goes on after them."""
    first, *others = streams[: len(runs)]
    with contextlib.ExitStack() as joined:
        for stream in others:
            joined.enter_context(_forked(stream, first))
        for run, stream in zip(runs, (first, *others), strict=True):
            with torch.cuda.stream(stream):
                run()


@contextlib.contextmanager
def _forked(stream: "torch.cuda.Stream", origin: "torch.cuda.Stream") -> Iterator[None]:
    """Let a stream begin after what its origin holds now, and the origin go on after what the stream holds at last."""
    stream.wait_stream(origin)
    try:
        yield
    finally:
        origin.wait_stream(stream)
