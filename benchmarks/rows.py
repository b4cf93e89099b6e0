"""The table of rows: all that is measured on a device; and what is left out."""

import torch

from gs_jacobi import gs_jacobi_rows
from itarflow import itarflow_rows
from ops import PUBLISHED, op_rows
from other_flows import other_flow_rows
from row import Row
from sampling import sampling_rows
from starflow import starflow_rows
from training import training_rows


def all_rows(device: torch.device) -> list[Row]:
    """List the rows of a device in the order of the targets, what takes seconds before what takes minutes."""
    ops, sampling = op_rows(device), sampling_rows(device)
    foremost = [row for row in ops if row.model.startswith(("ImageNet64", "Flow++"))]
    trained = [row for row in sampling if row.op == "guided sampling" and row.model.endswith("trained")]
    codes = [*itarflow_rows(device), *starflow_rows(device), *gs_jacobi_rows(device)]
    order = [*foremost, *trained, *training_rows(device), *sampling, *codes, *ops, *other_flow_rows(device)]
    return list(dict.fromkeys(order))


def left_out(device: torch.device) -> dict[str, str]:
    """Say what a device does not measure, and why."""
    same = {"attention and decoding of AFHQ256 patch 8": "the shapes are those of ImageNet64 patch 2"}
    if device.type == "cuda":
        return same | {
            "zuko's NSF, normflows and Pyro, inverted under torch.compile": "compiling all passes takes minutes"
        }
    slow = "takes too long on a CPU"
    return {
        **{f"ops of {shape.name}": slow for shape in PUBLISHED[2:]},
        "training and sampling with the published configurations": slow,
        "models under torch.compile": "compiling them takes minutes on a CPU",
        "bfloat16": "a CPU is measured in float32",
        "cold caches": "a CPU's are left as they are",
    }
