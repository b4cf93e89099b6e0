"""One pass of a block's transformer over the next G tokens of every row, against a key-value cache made beforehand."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow_kernels import KVCache, decode_attention, residual_norm

from ..coupling import Parameters
from ..transformer import CausalTransformer, TransformerLayer
from .branches import Branches

_FEW_ROWS = 8


class Step:
    """What :class:`CausalTransformer` computes for G new tokens per row, given all the earlier ones.

    Weights are cast and laid out once; the cache and the activations that outlive an operator have fixed buffers, so
    that a step allocates nothing but what its operators return. The layers run in the dtype of the autocast in force,
    or else in that of the weights; residuals, norms and the projections at both ends in that of the tokens.

    *Launches on a GPU.* Eight per layer: residual and norm, qkv, append and attend (one more where rows and heads are
    too few to fill the card, and the cache is split), output projection, residual and norm, the two products of the MLP
    and the GELU between them. Around the L layers five more: the last residual, the projection to mu and alpha, the
    guided affine map with the embedding of the next token, its copy, the positions: ``8 L + 5``, 69 for eight layers.
    With the mixture coupling guidance, map and embedding are operators of their own, and 20 in place of five.

    *Bytes.* The weights of the layers once, ``12 L C^2`` elements, and the cache once, ``2 L R n C`` elements at
    position n; everything else, some ``30 L R C`` elements of activations, is small beside them and stays on the chip.

    Args:
        transformer: of the block.
        branches: whose rows are decoded.
        dtype: of the tokens, float32 or float64.
        window: the largest G.

    Attributes:
        positions: int32 ``(R,)``, where the first new token of each row stands, from 0; whoever decodes moves it.
    """

    def __init__(self, transformer: CausalTransformer, branches: Branches, dtype: torch.dtype, window: int = 1):
        weight, rows = transformer.proj_in.weight, branches.rows
        device, (num_tokens, channels) = weight.device, transformer.pos_embed.shape
        autocast = torch.is_autocast_enabled(device.type)
        low = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        heads, head_dim = channels // transformer.layers[0].head_dim, transformer.layers[0].head_dim
        hidden_channels = transformer.layers[0].mlp[0].out_features

        self.split = transformer.coupling.split
        self.heads, self.head_dim = heads, head_dim
        self.context = None if branches.context is None else branches.context.to(dtype)
        self.temperature = branches.temperature
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        cache = KVCache.allocate(len(transformer.layers), rows, heads, num_tokens, head_dim, device=device, dtype=low)
        self.caches = list(cache)
        self.layers = [_Layer(layer, dtype, low) for layer in transformer.layers]
        self.proj_in, bias = _prepare(transformer.proj_in, dtype)
        self.proj_out, self.proj_out_bias = _prepare(transformer.proj_out, dtype)
        self.embedding = transformer.pos_embed.to(dtype) + bias
        self.offsets = torch.arange(window, dtype=torch.int32, device=device)
        self.qkv = torch.empty(rows * window, 3 * channels, device=device, dtype=low)
        self.hidden = torch.empty(rows * window, hidden_channels, device=device, dtype=low)
        self.shape: tuple[int, int] | None = None

    def __call__(self, tokens: Tensor) -> Parameters:
        """The tokens ``(R, G, D)`` at ``positions`` and behind to parameters ``(R, G, ...)``, one token further on.

        Where it stands is on the device alone, so that one CUDA graph serves every step.
        """
        return self.transform(self.embed(tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """``(R, G, D)`` to the first activations, ``(R, G, C)``."""
        places = self.positions[:, None] + self.offsets[: tokens.shape[1]]
        h = F.embedding(places, self.embedding)
        if self.context is not None:
            h += self.context[:, None]
        h.flatten(0, 1).addmm_(tokens.flatten(0, 1), self.proj_in)
        return h

    def transform(self, h: Tensor) -> Parameters:
        """The first activations, which it overwrites, to the parameters of the coupling."""
        rows, new, _ = h.shape
        qkv, hidden, activation, q, k, v = self._buffers(rows, new)
        h = h.flatten(0, 1)
        delta = None
        for layer, (cache_k, cache_v) in zip(self.layers, self.caches, strict=True):
            y = residual_norm(h, delta, *layer.attention_norm, dtype=qkv.dtype)
            torch.addmm(layer.qkv_bias, y, layer.qkv, out=qkv)
            attended = decode_attention(q, k, v, cache_k, cache_v, self.positions, temperature=self.temperature)
            delta = torch.addmm(layer.proj_bias, attended.transpose(1, 2).reshape(h.shape), layer.proj)
            y = residual_norm(h, delta, *layer.mlp_norm, dtype=qkv.dtype)
            torch.addmm(layer.up_bias, y, layer.up, out=hidden)
            torch.ops.aten.gelu_(activation)
            delta = torch.addmm(layer.down_bias, hidden, layer.down)
        return self.split(torch.addmm(self.proj_out_bias, h.add_(delta), self.proj_out).unflatten(0, (rows, new)))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.positions = self.positions[rows]
        self.caches = [(keys[rows], values[rows]) for keys, values in self.caches]
        if self.context is not None:
            self.context = self.context[rows]
        if isinstance(self.temperature, Tensor):
            self.temperature = self.temperature[rows]

    def _buffers(self, rows: int, new: int) -> tuple[Tensor, ...]:
        """Those of qkv and of the hidden layer for so many tokens, and the views of them that operators take."""
        if self.shape != (rows, new):
            qkv, hidden = self.qkv[: rows * new], self.hidden[: rows * new]
            heads = qkv.view(rows, new, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
            self.shape, self.views = (rows, new), (qkv, hidden, self._activation(hidden), *heads.unbind())
        return self.views

    def _activation(self, hidden: Tensor) -> Tensor:
        """The hidden layer as the GELU takes it: of few float32 rows on a CPU, a view that is not contiguous.

        oneDNN takes longer to set itself up than such a GELU lasts, and leaves to PyTorch what is not contiguous. (It
        can be turned off, but only for all threads of the process.)
        """
        few = hidden.is_cpu and hidden.dtype == torch.float32 and len(self.hidden) <= _FEW_ROWS
        return hidden.view(2, -1).transpose(0, 1) if few and hidden.numel() % 2 == 0 else hidden


class _Layer:
    """The weights of a layer: of its norms in the dtype of the residuals, of its products in that which they run in."""

    def __init__(self, layer: TransformerLayer, residuals: torch.dtype, dtype: torch.dtype):
        self.attention_norm = layer.attention_norm.weight.to(residuals), layer.attention_norm.bias.to(residuals)
        self.qkv, self.qkv_bias = _prepare(layer.qkv, dtype)
        self.proj, self.proj_bias = _prepare(layer.proj, dtype)
        self.mlp_norm = layer.mlp_norm.weight.to(residuals), layer.mlp_norm.bias.to(residuals)
        self.up, self.up_bias = _prepare(layer.mlp[0], dtype)
        self.down, self.down_bias = _prepare(layer.mlp[2], dtype)


def at(places: Tensor, tokens: Tensor) -> Tensor:
    """The tokens ``(B, G, D)`` at ``places`` ``(B, G)`` of ``(B, N, D)``."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def put(places: Tensor, tokens: Tensor, new: Tensor) -> None:
    """Write ``new`` ``(B, G, D)`` to ``places`` ``(B, G)`` of the tokens ``(B, N, D)``."""
    tokens.scatter_(1, places[..., None].expand_as(new), new)


def _prepare(linear: torch.nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias as addmm reads them fastest."""
    return linear.weight.to(dtype).t().contiguous(), linear.bias.to(dtype)
