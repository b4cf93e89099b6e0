"""One pass of a block's transformer over the next G tokens of every row, against a key-value cache made beforehand.

:class:`GuidedBatch` says which rows there are, :class:`StepWeights` what all of them share, :class:`CachedStep` is the
pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow_kernels import KVCache, decode_attention, residual_norm

from ..guidance import Guidance
from ..transformer import CausalTransformer, TransformerLayer
from ..transforms import Parameters

__all__ = ["CachedStep", "GuidedBatch", "StepWeights", "count_branches", "gather_tokens", "scatter_tokens"]

FEW_ROWS = 8


def count_branches(guidance: Guidance | None) -> int:
    """Return the number of rows per sample: two under guidance of any weight, else one."""
    return 2 if guidance is not None and guidance.weight else 1


class GuidedBatch:
    """The rows of a decoding batch: B of the conditional branch and, under guidance, B of the reference branch behind.

    Attributes:
        num_branches: 2 under guidance, else 1.
        rows: B, or 2B under guidance.
        context: class embedding of each row, ``(rows, C)``, or None for a model without classes.
        temperature: temperature of the attention logits, 1.0 or ``(rows,)``.
        weights: w_i of guidance for every token, ``(N,)``, or None without guidance.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        z: Tensor,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
    ):
        batch, num_tokens, _ = z.shape
        self.num_branches = count_branches(guidance)
        self.guidance = guidance if self.num_branches == 2 else None
        self.rows = self.num_branches * batch
        self.temperature: float | Tensor = 1.0
        self.weights: Tensor | None = None
        if self.guidance is not None:
            self.weights = self.guidance.weights(num_tokens).to(z)
            if labels is not None:
                reference = torch.full_like(labels, -1) if self.guidance.drop_label else labels
                labels = torch.cat((labels, reference))
            if self.guidance.temperature != 1:
                taus = transformer.pos_embed.new_tensor([1.0, self.guidance.temperature])
                self.temperature = taus.repeat_interleave(batch)
        self.context = transformer.embed_classes(labels)

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
        w = -self.weights[positions]
        pairs: Any = zip(*self.split_branches(parameters), strict=True)
        return tuple(torch.lerp(v, ref, w.view(*w.shape, *[1] * (v.dim() - 2))) for v, ref in pairs)

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
    """

    def __init__(self, transformer: CausalTransformer, dtype: torch.dtype):
        weight, layers = transformer.proj_in.weight, list[Any](transformer.layers)
        autocast = torch.is_autocast_enabled(weight.device.type)
        self.dtype = dtype
        self.layer_dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        self.head_dim, self.hidden_channels = layers[0].head_dim, layers[0].mlp[0].out_features
        self.split = transformer.transform.split
        self.layers = [_LayerWeights(layer, dtype, self.layer_dtype) for layer in layers]
        self.proj_in, bias = _prepare(transformer.proj_in, dtype)
        self.proj_out, self.proj_out_bias = _prepare(transformer.proj_out, dtype)
        self.embedding = transformer.pos_embed.to(dtype) + bias


class CachedStep:
    """The pass of a :class:`CausalTransformer` over G new tokens per row, given all the earlier ones.

    The cache and the activations that outlive an operator have fixed buffers, so that a step allocates nothing but what
    its operators return.

    *Launches on a GPU.* Eight per layer: residual and norm, qkv, append and attend (one more where rows and heads are
    too few to fill the card, and the cache is split), output projection, residual and norm, the two products of the MLP
    and the GELU between them. Around the L layers three more: the last residual, the projection to mu and alpha, the
    guided affine map with the embedding of the next token and its position: ``8 L + 3``, 67 for eight layers. With a
    mixture transform guidance, map and embedding are operators of their own, and 20 in place of three.

    *Bytes.* The weights of the layers once, ``12 L C^2`` elements, and the cache once, ``2 L R n C`` elements at
    position n; everything else, some ``30 L R C`` elements of activations, is small beside them and stays on the chip.

    Args:
        weights: those of the transformer.
        batch: the rows that are decoded.
        window: the largest G.

    Attributes:
        positions: int32 ``(R,)``, where the first new token of each row stands, from 0; whoever decodes moves it.
    """

    def __init__(self, weights: StepWeights, batch: GuidedBatch, window: int = 1):
        (num_tokens, channels), device, low = weights.embedding.shape, weights.embedding.device, weights.layer_dtype
        rows, num_layers = batch.rows, len(weights.layers)
        self.weights = weights
        self.heads, self.head_dim = channels // weights.head_dim, weights.head_dim
        self.context = None if batch.context is None else batch.context.to(weights.dtype)
        self.temperature = batch.temperature
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        cache = KVCache.allocate(num_layers, rows, self.heads, num_tokens, self.head_dim, device=device, dtype=low)
        self.caches = list(cache)
        self.offsets = torch.arange(window, dtype=torch.int32, device=device)
        self.qkv = torch.empty(rows * window, 3 * channels, device=device, dtype=low)
        self.hidden = torch.empty(rows * window, weights.hidden_channels, device=device, dtype=low)
        self.shape: tuple[int, int] | None = None

    def __call__(self, tokens: Tensor) -> Parameters:
        """Compute the parameters ``(R, G, ...)`` of the tokens that follow each of ``(R, G, D)`` at ``positions``.

        The positions are on the device alone, so that one CUDA graph serves every step.
        """
        return self.run_layers(self.embed(tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens ``(R, G, D)`` at ``positions``: the first activations, ``(R, G, C)``."""
        h = F.embedding(self.positions[:, None] + self.offsets[: tokens.shape[1]], self.weights.embedding)
        if self.context is not None:
            h += self.context[:, None]
        h.flatten(0, 1).addmm_(tokens.flatten(0, 1), self.weights.proj_in)
        return h

    def run_layers(self, h: Tensor) -> Parameters:
        """Map the first activations, which are overwritten, to the parameters of the transform."""
        (rows, new, _), weights = h.shape, self.weights
        qkv, hidden, activation, q, k, v = self._buffers(rows, new)
        h = h.flatten(0, 1)
        delta: Tensor | None = None
        for layer, (cache_k, cache_v) in zip(weights.layers, self.caches, strict=True):
            y = residual_norm(h, delta, *layer.attention_norm, dtype=qkv.dtype)
            torch.addmm(layer.qkv_bias, y, layer.qkv, out=qkv)
            attended = decode_attention(q, k, v, cache_k, cache_v, self.positions, temperature=self.temperature)
            delta = torch.addmm(layer.proj_bias, attended.transpose(1, 2).reshape(h.shape), layer.proj)
            y = residual_norm(h, delta, *layer.mlp_norm, dtype=qkv.dtype)
            torch.addmm(layer.up_bias, y, layer.up, out=hidden)
            torch.ops.aten.gelu_(activation)
            delta = torch.addmm(layer.down_bias, hidden, layer.down)
        assert delta is not None, "a transformer has a layer at least"
        outputs = torch.addmm(weights.proj_out_bias, h.add_(delta), weights.proj_out)
        return weights.split(outputs.unflatten(0, (rows, new)))

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.positions = self.positions[rows]
        self.caches = [(keys[rows], values[rows]) for keys, values in self.caches]
        if self.context is not None:
            self.context = self.context[rows]
        if isinstance(self.temperature, Tensor):
            self.temperature = self.temperature[rows]

    def _buffers(self, rows: int, new: int) -> tuple[Tensor, ...]:
        """Return the buffers of qkv and of the hidden layer for so many tokens, and their views for the operators."""
        if self.shape != (rows, new):
            qkv, hidden = self.qkv[: rows * new], self.hidden[: rows * new]
            heads = qkv.view(rows, new, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
            self.shape, self.views = (rows, new), (qkv, hidden, self._gelu_view(hidden), *heads.unbind())
        return self.views

    def _gelu_view(self, hidden: Tensor) -> Tensor:
        """Return the hidden layer as the GELU takes it: for few float32 rows on a CPU, a view that is not contiguous.

        oneDNN takes longer to set itself up than such a GELU lasts, and leaves tensors that are not contiguous to
        PyTorch. (It can be turned off, but only for all threads of the process.)
        """
        few = hidden.is_cpu and hidden.dtype == torch.float32 and len(self.hidden) <= FEW_ROWS
        return hidden.view(2, -1).transpose(0, 1) if few and hidden.numel() % 2 == 0 else hidden


class _LayerWeights:
    """The weights of a layer: norms in the dtype of the residuals, products in the dtype in which they run."""

    def __init__(self, layer: TransformerLayer, residuals: torch.dtype, dtype: torch.dtype):
        self.attention_norm = layer.attention_norm.weight.to(residuals), layer.attention_norm.bias.to(residuals)
        self.qkv, self.qkv_bias = _prepare(layer.qkv, dtype)
        self.proj, self.proj_bias = _prepare(layer.proj, dtype)
        self.mlp_norm = layer.mlp_norm.weight.to(residuals), layer.mlp_norm.bias.to(residuals)
        up, _, down = layer.mlp
        self.up, self.up_bias = _prepare(up, dtype)
        self.down, self.down_bias = _prepare(down, dtype)


def _prepare(linear: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weight and bias as addmm reads them fastest."""
    return linear.weight.to(dtype).t().contiguous(), linear.bias.to(dtype)


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Read the tokens ``(B, G, D)`` at ``positions`` ``(B, G)`` of ``(B, N, D)``."""
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[2]))


def scatter_tokens(tokens: Tensor, positions: Tensor, new: Tensor) -> None:
    """Write ``new`` ``(B, G, D)`` to ``positions`` ``(B, G)`` of the tokens ``(B, N, D)``."""
    tokens.scatter_(1, positions[..., None].expand_as(new), new)
