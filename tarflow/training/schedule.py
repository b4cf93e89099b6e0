"""The learning rate as a function of the step alone, so that there is no state to save."""

import math
from typing import Literal

Schedule = Literal["cosine", "constant", "flowpp-imagenet32", "flowpp-imagenet64"]


def learning_rate(
    step: int, *, peak: float, least: float, warmup_steps: int, max_steps: int, schedule: Schedule = "cosine"
) -> float:
    """The rate of update number ``step``, counted from 1.

    Linear from ``least`` to ``peak`` over the warm-up; then, where ``schedule`` is ``"cosine"``, half a cosine down to
    ``least`` at the last step, and where it is ``"constant"``, ``peak``. The others are those that Flow++ was published
    with, in units of ``peak`` and by the number of the step alone: see :func:`flowpp_imagenet32` and
    :func:`flowpp_imagenet64`.

    >>> rates = [learning_rate(step, peak=1.0, least=0.0, warmup_steps=2, max_steps=6) for step in range(1, 7)]
    >>> [round(rate, 2) for rate in rates]
    [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    >>> learning_rate(5, peak=1.0, least=0.0, warmup_steps=2, max_steps=6, schedule="constant")
    1.0
    """
    if step <= warmup_steps:
        return least + (peak - least) * step / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "flowpp-imagenet32":
        return peak * flowpp_imagenet32(step)
    if schedule == "flowpp-imagenet64":
        return peak * flowpp_imagenet64(step)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


def flowpp_imagenet32(step: int) -> float:
    """1 up to step 50,000, then less by a factor 0.99995 a step, down to 0.3.

    Source: aravindsrinivas/flowpp, ``imagenet32_official.py``, where the peak is 1e-3 after 5,000 steps.
    """
    return max(0.3, 0.99995 ** max(0, step - 50_000))


def flowpp_imagenet64(step: int) -> float:
    """1 up to step 50,000, then less by a factor 0.99995 a step; 3/4 from 55,000 on. Later it warms up twice more.

    To 1/40 over the 10,000 steps from 230,000 on, and to 1/400 over those from 280,000 on, "to prevent any NaNs". Each
    begins at 0. Source: aravindsrinivas/flowpp, ``imagenet64_official.py``, where the peak is 4e-4 after 10,000 steps;
    as its docstring says, since its code returns no rate at the borders, and negative rates in the last warm-up.
    """
    if step < 55_000:
        return 0.99995 ** max(0, step - 50_000)
    if step < 230_000:
        return 3 / 4
    if step < 280_000:
        return min(1.0, (step - 230_000) / 10_000) / 40
    return min(1.0, (step - 280_000) / 10_000) / 400
