"""A checkpoint in the form of the paper's code, for the tests and for ``tools/hostile``."""

import torch


def published_state() -> dict[str, torch.Tensor]:
    """A state dict as the paper's code saves it: two blocks of one layer over 4x4 images of three channels."""
    width, tokens, values = 64, 4, 12
    shapes = {
        "proj_in.weight": (width, values), "proj_in.bias": (width,), "pos_embed": (tokens, width),
        "proj_out.weight": (2 * values, width), "proj_out.bias": (2 * values,), "class_embed": (3, 1, width),
        "attn_mask": (tokens, tokens),
    }  # fmt: skip
    for name, outputs, *inputs in [
        ("attention.norm", width), ("attention.qkv", 3 * width, width), ("attention.proj", width, width),
        ("mlp.norm", width), ("mlp.main.0", 4 * width, width), ("mlp.main.2", width, 4 * width),
    ]:  # fmt: skip
        shapes |= {f"attn_blocks.0.{name}.weight": (outputs, *inputs), f"attn_blocks.0.{name}.bias": (outputs,)}
    draw = torch.Generator().manual_seed(0)
    state = {f"blocks.{t}.{name}": torch.randn(s, generator=draw) / 10 for t in (0, 1) for name, s in shapes.items()}
    return state | {"var": torch.ones(tokens, values)}
