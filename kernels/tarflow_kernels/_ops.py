"""The namespace in which the ops are registered.

A copy that the Kernel Hub serves has another module of this name, with another namespace, so that one process can load
several. ``tools/kernel_hub.py`` assembles it.
"""

import torch

ops = torch.ops.tarflow


def add_op_namespace_prefix(name: str) -> str:
    """Return the full name of an op, such as ``tarflow::affine_forward``."""
    return f"{ops.name}::{name}"
