"""The flow in eager PyTorch, as one would first write it; the fast paths are measured against it.

Decoding makes one pass per branch of guidance and token, through the layers of the model as they are, and grows its
caches by concatenation. Training attends through a dense mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow import Guidance, TokenFlow
from tarflow.flow import Block
from tarflow.transformer import TransformerLayer

Cache = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def inverse(flow: TokenFlow, z: Tensor, labels: Tensor | None, guidance: Guidance | None) -> Tensor:
    """Turn latents into tokens, ``(B, N, D)`` both."""
    for block in reversed(flow.blocks):
        z = _permute(block, _inverse_block(block, _permute(block, z), labels, guidance))
    return z


def forward(block: Block, tokens: Tensor, labels: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Turn tokens into latents and a log-det, attending where the dense ``mask`` ``(N, N)`` is True."""
    transformer = block.transformer
    tokens = _permute(block, tokens)
    h = _embed(block, tokens, labels) + transformer.pos_embed
    for layer in transformer.layers:
        h = _layer(layer, h, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    mu, alpha = (F.pad(parameter[:, :-1], (0, 0, 1, 0)) for parameter in transformer.project_out(h))
    return _permute(block, (tokens - mu) * torch.exp(-alpha)), -alpha.sum((1, 2))


def _inverse_block(block: Block, z: Tensor, labels: Tensor | None, guidance: Guidance | None) -> Tensor:
    layers = len(block.transformer.layers)
    caches: dict[str, Cache] = {branch: [(z.new_empty(0),) * 2] * layers for branch in ("conditional", "reference")}
    weights = guidance.weights(z.shape[1]) if guidance else None
    dropped = None if labels is None else torch.full_like(labels, -1)
    x = z.clone()
    for i in range(z.shape[1] - 1):
        mu, alpha = _step(block, x[:, i : i + 1], i, labels, caches["conditional"])
        if guidance:
            mu_ref, alpha_ref = _step(block, x[:, i : i + 1], i, dropped, caches["reference"])
            mu, alpha = mu + weights[i + 1] * (mu - mu_ref), alpha + weights[i + 1] * (alpha - alpha_ref)
        x[:, i + 1] = z[:, i + 1] * torch.exp(alpha[:, 0]) + mu[:, 0]
    return x


def _step(block: Block, token: Tensor, i: int, labels: Tensor | None, cache: Cache) -> tuple[Tensor, Tensor]:
    h = _embed(block, token, labels) + block.transformer.pos_embed[i]
    for index, layer in enumerate(block.transformer.layers):

        def attend(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> Tensor:
            if i:
                k, v = torch.cat((cache[index][0], k), dim=2), torch.cat((cache[index][1], v), dim=2)
            cache[index] = k, v
            return F.scaled_dot_product_attention(q, k, v)

        h = _layer(layer, h, attend)
    return block.transformer.project_out(h)


def _embed(block: Block, tokens: Tensor, labels: Tensor | None) -> Tensor:
    h = block.transformer.proj_in(tokens)
    return h if labels is None else h + block.transformer.embed_classes(labels)[:, None]


def _layer(layer: TransformerLayer, x: Tensor, attend) -> Tensor:
    batch, length, _ = x.shape
    qkv = layer.qkv(layer.attention_norm(x)).view(batch, length, 3, -1, layer.head_dim)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    x = x + layer.proj(attend(q, k, v).transpose(1, 2).reshape(batch, length, -1))
    return x + layer.mlp(layer.mlp_norm(x))


def _permute(block: Block, tokens: Tensor) -> Tensor:
    return tokens.flip(1) if block.reverse else tokens
