"""The work between steps: when it is due, and how long a run still takes with it."""

from collections.abc import Mapping

from .config import TrainingConfig

__all__ = ["TimeLeft", "is_due", "work_left"]


def is_due(step: int, every: int) -> bool:
    """Return whether a look at the model is due: every so many steps, and once early, after a quarter of the first.

    >>> [step for step in range(1, 25) if is_due(step, every=8)]
    [2, 8, 16, 24]
    """
    return step % every == 0 or step == every // 4


def work_left(step: int, config: TrainingConfig) -> dict[str, int]:
    """Count the steps behind one, and the other work from it on; after the last step everything is done once more.

    >>> work_left(100, TrainingConfig(max_steps=2000, evaluate_every=500, sample_every=1000, checkpoint_every=400))
    {'step': 1900, 'evaluate': 5, 'sample': 3, 'save': 5}
    """
    last = config.max_steps

    def often(every: int) -> int:
        return (last - 1) // every - (step - 1) // every + 1

    def looks(every: int) -> int:
        return often(every) + (step <= every // 4 < last)

    return {
        "step": last - step,
        "evaluate": looks(config.evaluate_every),
        "sample": looks(config.sample_every),
        "save": often(config.checkpoint_every),
    }


class TimeLeft:
    """An estimate of the seconds that a run has left: each kind of work takes what it has taken so far, on average.

    Work that was not done yet counts for nothing, and neither does what is done but once, at the end.
    """

    def __init__(self) -> None:
        self.taken: dict[str, tuple[int, float]] = {}

    def note(self, work: str, seconds: float, count: int = 1) -> None:
        """Take account of work that was done so many times."""
        times, total = self.taken.get(work, (0, 0.0))
        self.taken[work] = times + count, total + seconds

    def estimate(self, left: Mapping[str, int]) -> float:
        """Return the seconds that work will take, so many times of each kind."""
        return sum(
            count * self.taken[work][1] / self.taken[work][0] for work, count in left.items() if work in self.taken
        )
