"""What a card will be asked to run, compiled beforehand: by processes that need no card, into Triton's cache."""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial

import torch

from tarflow_kernels import cases

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def launches() -> list[Callable[[], object]]:
    """List what builds the launches of the ops, then of the models, in the order of the rows."""
    decode = partial(cases.decoding, "meta", BFLOAT16)
    mixtures = itertools.product(("elements",), (32, 4), (False, True))
    return [
        partial(cases.attention, "meta", BFLOAT16, 32, 1024, 64),
        partial(cases.attention, "meta", BFLOAT16, 128, 256, 64),
        *(partial(decode, 32, new, 64, capacity=capacity) for capacity in (1024, 256) for new in (1, 16)),
        *(partial(cases.affine, "meta", FLOAT32, 32, *size) for size in ((1024, 12), (256, 48))),
        *(partial(cases.affine, "meta", FLOAT32, 32, *size, inverse=True) for size in ((1024, 12), (256, 48))),
        *(partial(cases.mixture, "meta", FLOAT32, 64, k, order, inverse=inverse) for order, k, inverse in mixtures),
        # The trained model, in sequence, in windows and whole.
        *(partial(decode, 64, new, 64, capacity=196) for new in (1, 16, 64, 196)),
        *_between_products(196, 4, 128),
        # The published ones.
        partial(cases.affine, "meta", BFLOAT16, 16, 1024, 12),
        *(partial(decode, 64, new, 64) for new in (1, 16, 64, 256, 1024)),
        *_between_products(1024, 12, 768),
        *_between_products(1024, 48, 1024),
        *_between_products(1024, 192, 768),
    ]


def _between_products(tokens: int, token_dim: int, channels: int) -> list[Callable[[], object]]:
    """What a step of decoding launches beside attention and products."""
    return [
        *(
            partial(cases.embedding, "meta", BFLOAT16, 64, tokens, token_dim, channels, guided=guided)
            for guided in (True, False)
        ),
        *(
            partial(cases.normalization, "meta", BFLOAT16, 64, channels, residual=residual)
            for residual in (True, False)
        ),
    ]


def compile(build: Callable[[], object], device: torch.device) -> None:
    """Compile what one of these launches, for the card at hand, or for an H100 where there is none."""
    import triton

    from tarflow_kernels.offline import TARGETS, compile_only

    on_gpu = device.type == "cuda"
    target = triton.runtime.driver.active.get_current_target() if on_gpu else TARGETS["sm_90"]

    def launch() -> None:
        built = build()
        for each in built if isinstance(built, tuple) else (built,):
            each()

    # What cannot be compiled is found out, and told, by whoever needs it.
    with contextlib.suppress(Exception):
        compile_only(target, launch)
