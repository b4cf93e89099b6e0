"""One pass of a block's transformer over the next G tokens of every row, against a key-value cache made beforehand."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow_kernels import KVCache, decode_attention

from ..transformer import CausalTransformer


class Step:
    """What :class:`CausalTransformer` computes for G new tokens per row, given all the earlier ones.

    Weights are cast (to the dtype of the autocast in force) and laid out once; the cache and the activations that
    outlive an operator have fixed buffers, so that a step allocates nothing but what its operators return. Residuals
    stay in the dtype of the weights, and so does the output projection.

    Args:
        transformer: of the block.
        rows: R, the batch size times the branches of guidance.
        context: embedding of each row's class, ``(R, C)``, or None.
        temperature: of the attention logits, a number or ``(R,)``.
        window: the largest G.

    Attributes:
        positions: int32 ``(R,)``, where the first new token of each row stands, from 0; whoever decodes moves it.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        rows: int,
        context: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        window: int = 1,
    ):
        weight = transformer.proj_in.weight
        device, (num_tokens, channels) = weight.device, transformer.pos_embed.shape
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        head_dim = transformer.layers[0].head_dim
        hidden_channels = transformer.layers[0].mlp[0].out_features

        self.split_output = transformer.split_output
        self.heads, self.head_dim = channels // head_dim, head_dim
        self.context = context
        self.temperature = temperature
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self.cache = KVCache.allocate(
            len(transformer.layers), rows, self.heads, num_tokens, head_dim, device=device, dtype=dtype
        )
        self.layers = [
            (
                layer.attention_norm,
                *_prepare(layer.qkv, dtype),
                *_prepare(layer.proj, dtype),
                layer.mlp_norm,
                *_prepare(layer.mlp[0], dtype),
                *_prepare(layer.mlp[2], dtype),
            )
            for layer in transformer.layers
        ]
        self.proj_in, self.proj_in_bias = _prepare(transformer.proj_in, weight.dtype)
        self.proj_out, self.proj_out_bias = _prepare(transformer.proj_out, weight.dtype)
        self.embedding = transformer.pos_embed + self.proj_in_bias
        self.offsets = torch.arange(window, dtype=torch.int32, device=device)
        self.qkv = torch.empty(rows * window, 3 * channels, device=device, dtype=dtype)
        self.hidden = torch.empty(rows * window, hidden_channels, device=device, dtype=dtype)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens ``(R, G, D)`` at ``positions`` and behind to mu and alpha, ``(R, G, D)``, one token further on.

        Where it stands is on the device alone, so that one CUDA graph serves every step.
        """
        rows, new, _ = tokens.shape
        qkv, hidden = self.qkv[: rows * new], self.hidden[: rows * new]
        q, k, v = qkv.view(rows, new, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind()
        h = self._embed(tokens)
        for layer, (cache_k, cache_v) in zip(self.layers, self.cache, strict=True):
            norm1, w_qkv, b_qkv, w_proj, b_proj, norm2, w_up, b_up, w_down, b_down = layer
            torch.addmm(b_qkv, _normalize(norm1, h, qkv.dtype), w_qkv, out=qkv)
            attended = decode_attention(q, k, v, cache_k, cache_v, self.positions, temperature=self.temperature)
            _accumulate(h, attended.transpose(1, 2).flatten(2).flatten(0, 1), w_proj, b_proj)
            torch.addmm(b_up, _normalize(norm2, h, hidden.dtype), w_up, out=hidden)
            _accumulate(h, F.gelu(hidden), w_down, b_down)
        return self.split_output(torch.addmm(self.proj_out_bias, h, self.proj_out).unflatten(0, (rows, new)))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.positions = self.positions[rows]
        self.cache = KVCache(self.cache.keys[:, rows], self.cache.values[:, rows])
        if self.context is not None:
            self.context = self.context[rows]
        if isinstance(self.temperature, Tensor):
            self.temperature = self.temperature[rows]

    def _embed(self, tokens: Tensor) -> Tensor:
        rows, new, _ = tokens.shape
        places = self.positions[:, None] + self.offsets[:new]
        h = self.embedding.index_select(0, places.flatten()).addmm_(tokens.flatten(0, 1), self.proj_in)
        if self.context is not None:
            h.unflatten(0, (rows, new)).add_(self.context[:, None])
        return h


@contextlib.contextmanager
def without_onednn(hidden: Tensor) -> Iterator[None]:
    """For a hidden layer of few float32 rows on a CPU: oneDNN takes longer to set its GELU up than to compute it."""
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or len(hidden) > 8:
        yield
        return
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


def _prepare(linear: torch.nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias as addmm reads them fastest."""
    return linear.weight.to(dtype).t().contiguous(), linear.bias.to(dtype)


def _normalize(norm: torch.nn.LayerNorm, h: Tensor, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(dtype)


def _accumulate(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """``h += x weight + bias`` in the dtype of h."""
    if h.dtype == x.dtype:
        h.addmm_(x, weight).add_(bias)
    else:
        h.add_(torch.addmm(bias, x, weight))
