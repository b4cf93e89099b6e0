"""One decoding step: the next token of every row through the transformer of a block, in buffers made beforehand."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow_kernels import KVCache, decode_attention

from ..transformer import CausalTransformer


class Step:
    """What :class:`CausalTransformer` computes for one new token per row, given all the earlier ones.

    Weights are cast (to the dtype of the autocast in force) and laid out once; the cache and the activations that
    outlive an operator have fixed buffers, so that a step allocates nothing but what its operators return. Residuals
    stay in the dtype of the weights, and so does the output projection.

    Args:
        transformer: of the block.
        rows: R, the batch size times the branches of guidance.
        context: embedding of each row's class, ``(R, C)``, or None.
        temperature: of the attention logits, a number or ``(R,)``.

    Attributes:
        positions: int32 ``(R,)``, where each row stands, from 0; whoever decodes moves it.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        rows: int,
        context: Tensor | None = None,
        temperature: float | Tensor = 1.0,
    ):
        weight = transformer.proj_in.weight
        device, (num_tokens, channels) = weight.device, transformer.pos_embed.shape
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        head_dim = transformer.layers[0].head_dim
        heads = channels // head_dim

        self.split_output = transformer.split_output
        self.temperature = temperature
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        cache = KVCache.allocate(len(transformer.layers), rows, heads, num_tokens, head_dim, device=device, dtype=dtype)
        self.layers = [
            (
                layer.attention_norm,
                *_prepare(layer.qkv, dtype),
                *keys_and_values,
                *_prepare(layer.proj, dtype),
                layer.mlp_norm,
                *_prepare(layer.mlp[0], dtype),
                *_prepare(layer.mlp[2], dtype),
            )
            for layer, keys_and_values in zip(transformer.layers, cache, strict=True)
        ]
        self.proj_in, self.proj_in_bias = _prepare(transformer.proj_in, weight.dtype)
        self.proj_out, self.proj_out_bias = _prepare(transformer.proj_out, weight.dtype)
        self.embedding = transformer.pos_embed + self.proj_in_bias
        self.context = context if context is not None else weight.new_zeros(1, channels)
        hidden_channels = transformer.layers[0].mlp[0].out_features
        self.hidden = torch.empty(rows, hidden_channels, device=device, dtype=dtype)
        self.qkv = torch.empty(rows, 3 * channels, device=device, dtype=dtype)
        self.q, self.k, self.v = self.qkv.view(rows, 3, heads, 1, head_dim).unbind(1)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens ``(R, D)`` at ``positions`` to mu and alpha of those behind them, each ``(R, D)``.

        Where it stands is on the device alone, so that one CUDA graph serves every step.
        """
        h = torch.addmm(self.context, tokens, self.proj_in).add_(self.embedding.index_select(0, self.positions))
        for norm1, w_qkv, b_qkv, cache_k, cache_v, w_proj, b_proj, norm2, w_up, b_up, w_down, b_down in self.layers:
            torch.addmm(b_qkv, _normalize(norm1, h, self.qkv.dtype), w_qkv, out=self.qkv)
            attended = decode_attention(
                self.q, self.k, self.v, cache_k, cache_v, self.positions, temperature=self.temperature
            )
            _accumulate(h, attended.view(len(h), -1), w_proj, b_proj)
            torch.addmm(b_up, _normalize(norm2, h, self.hidden.dtype), w_up, out=self.hidden)
            _accumulate(h, F.gelu(self.hidden), w_down, b_down)
        return self.split_output(torch.addmm(self.proj_out_bias, h, self.proj_out))


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
