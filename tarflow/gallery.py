"""Old names, until all callers have the new ones."""

from . import pictures
from .datasets import evenly_spaced as spread  # noqa: F401


class Gallery(pictures.Gallery):
    samples, trajectory = pictures.Gallery.save_samples, pictures.Gallery.save_trajectory

    def draw(self, model, num, labels, progress=lambda statistics: None):
        return self.draw_samples(model, num, labels, progress=progress)
