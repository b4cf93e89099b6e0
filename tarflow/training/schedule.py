"""The learning rate as a function of the step alone, so that there is no state to save."""

import math


def learning_rate(
    step: int, *, peak: float, least: float, warmup_steps: int, max_steps: int, schedule: str = "cosine"
) -> float:
    """The rate of update number ``step``, counted from 1.

    Linear from ``least`` to ``peak`` over the warm-up; then, where ``schedule`` is ``"cosine"``, half a cosine down to
    ``least`` at the last step, and where it is ``"constant"``, ``peak``.

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
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))
